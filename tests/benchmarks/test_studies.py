"""Studies of training: what they run, that they go on where they stopped, and what they say of it."""

import concurrent.futures
import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy import stats
from training_runs import assert_equal

from benchmarks import (
    deep_r,
    dst_study,
    few_study,
    gru,
    own_trainer,
    recipe_study,
    relu,
    sequence_study,
    step_costs,
    structure_study,
    study,
    tradeoff_study,
)
from benchmarks.redraw import STUDIES
from benchmarks.study import Study, spread
from g2g_kernels import BlockMask, GroupLayout
from g2gnet import G2GLinear, G2GNet
from g2gnet.base.tables import markdown
from g2gnet.base.tensor_files import read_tensors
from g2gnet.data import load_dataset
from g2gnet.data.npz import name_of
from g2gnet.training import CheckpointError, TrainingError, TrainSettings

SMALL = Study(
    "small_study",
    "A study of three steps.",
    "--dataset fashionmnist-mini --model index --hidden_dim 64 --block_size 16 --T 3 --limit_train 96 --limit_test 32 "
    "--batch_size 32 --enc_scale 3",
    {"static": "", "gradient": "--sparsity_mode dynamic --cg gradient --dst_interval 1 --dst_schedule cosine"},
    1,
    lambda record: markdown(
        ["row", "accuracy"], [[row["row"], spread(row["ends"], study.accuracy)] for row in record["rows"]]
    ),
)


@pytest.mark.parametrize("each", STUDIES.values(), ids=STUDIES)
def test_every_row_is_a_run_that_train_takes(each, tmp_path):
    seen = set()
    for row in each.rows:
        settings = study.run_of(each, row, each.epochs, 1, tmp_path).settings
        own = re.search(r"--epochs (\d+)", each.rows[row])
        assert settings.epochs == (int(own[1]) if own else each.epochs)
        seen.add(json.dumps(settings.as_dict()))
    assert len(seen) == len(each.rows)  # no two of them are the same run
    folders = {study.folder_of(tmp_path, each, row, each.epochs, 1) for row in each.rows}
    assert len(folders) == len(each.rows)


def test_densities_are_those_that_the_rows_name(tmp_path):
    for row in dst_study.STUDY.rows:
        settings = study.run_of(dst_study.STUDY, row, 1, 1, tmp_path).settings
        density = settings.p_intra / 8 + 7 / 8 * settings.p_inter
        named = float(row.split(", ")[1].removesuffix(" %")) / 100
        assert density == pytest.approx(0.25625 if named == 0.25 else named, rel=1e-3)
        assert settings.p_inter == pytest.approx(0.15 * settings.p_intra, rel=1e-3)


@pytest.fixture
def trained(monkeypatch):
    """Has studies train in a thread of this process; the folders of the runs, as they begin."""
    began = []

    class Pool(ThreadPoolExecutor):
        def submit(self, function, given, folder):
            began.append(folder)
            return super().submit(function, given, folder)

    monkeypatch.setattr(study, "processes", lambda jobs, threads: Pool(1))
    return began


def test_a_study_goes_on_where_it_stopped_and_records_what_there_is(tmp_path, capsys, trained):
    arguments = ["--runs", str(tmp_path), "--seeds", "1", "--jobs", "2", "--json", str(tmp_path / "record.json")]
    assert study.run_study(SMALL, [*arguments, "--rows", "gradient"]) == 0
    assert study.run_study(SMALL, [*arguments, "--finished"]) == 0
    assert [row["row"] for row in json.loads((tmp_path / "record.json").read_text())["rows"]] == ["gradient"]
    assert len(trained) == 1
    assert study.run_study(SMALL, arguments) == 0
    assert len(trained) == 2  # the other one was finished
    record = json.loads((tmp_path / "record.json").read_text())
    (end,) = record["rows"][1]["ends"]
    assert (record["rows"][1]["row"], end["seed"]) == ("gradient", 1)
    assert end["train_seconds"] > 0
    assert end["train_cpu_seconds"] > 0
    assert end["weights"] == sum(
        round(end["density"][name] * size) for name, size in (("fc1", 784 * 64), ("fc2", 64 * 64), ("fc3", 640))
    )
    assert set(end["placement"]["fc2"]) == {"rows_spread", "cols_spread", "rows_empty", "cols_empty", "inside"}
    assert f"| gradient | {100 * end['test_acc']:.2f} (n = 1) |" in capsys.readouterr().out


def test_validation_tests_on_training_images_that_are_held_back(tmp_path, monkeypatch, trained):
    mini = load_dataset("fashionmnist-mini")
    monkeypatch.setattr(study, "load_dataset", lambda *_: mini)
    arguments = ["--runs", str(tmp_path), "--seeds", "1", "2", "--rows", "static", "--validation"]
    assert study.run_study(SMALL, [*arguments, "--json", str(tmp_path / "record.json")]) == 0
    size = len(mini.train_images) // 6
    for seed, fold, of in ((1, 6, slice(5 * size, 6 * size)), (2, 5, slice(4 * size, 5 * size))):
        folder = tmp_path / "validation" / f"fold-{fold}"
        held_back = load_dataset(name_of(folder / "fashionmnist-validation.npz"))
        assert torch.equal(held_back.test_images, mini.train_images[of])
        assert torch.equal(held_back.test_labels, mini.train_labels[of])
        rest = torch.cat([mini.train_images[: of.start], mini.train_images[of.stop :]])
        assert torch.equal(held_back.train_images, rest)
        assert [run.name for run in (folder / "small_study").iterdir()] == [f"static-1-epochs-seed{seed}"]
    tested_on = json.loads((tmp_path / "record.json").read_text())["tested_on"]
    assert tested_on == "a sixth of the training images, another one for each seed"
    assert not (tmp_path / "small_study").exists()  # runs that are tested on test images are others
    assert [study.fold_of(seed) for seed in range(8)] == [1, 6, 5, 4, 3, 2, 1, 6]


def test_an_earlier_record_is_extended(tmp_path, capsys, trained):
    earlier, extended = tmp_path / "earlier.json", tmp_path / "extended.json"
    arguments = ["--seeds", "2", "--rows", "static", "--json", str(earlier)]
    assert study.run_study(SMALL, ["--runs", str(tmp_path / "one"), *arguments]) == 0
    more = ["--runs", str(tmp_path / "two"), "--extend", str(earlier)]
    arguments = ["--seeds", "1", "2", "--rows", "static", "--json", str(extended)]
    assert study.run_study(SMALL, [*more, *arguments]) == 0
    assert len(list((tmp_path / "two" / "small_study").iterdir())) == 1  # one run was taken over
    before, after = (json.loads(path.read_text()) for path in (earlier, extended))
    assert before["machine"]["threads"] == 1
    (old,) = before["rows"][0]["ends"]
    new, taken = after["rows"][0]["ends"]
    assert taken == {"measured": {name: before["machine"][name] for name in ("commit", "date")}, **old}
    assert (new["seed"], "measured" in new) == (1, False)

    # rows that are not asked for stay, and a run is dated by the record that measured it
    assert study.run_study(SMALL, [*more[:2], "--extend", str(extended), "--finished", "--rows", "gradient"]) == 0
    assert "| static |" in capsys.readouterr().out
    assert study.taken_over(SMALL, extended, after)["static", 2] == taken

    def refusal(content):
        earlier.write_text(json.dumps(content))
        assert study.run_study(SMALL, [*more, "--finished"]) == 1
        return capsys.readouterr().err

    assert "its epochs is 2, now it is 1" in refusal({**before, "epochs": 2})
    other = {**before["machine"], "cpu": "6502"}
    assert "its cpu is '6502', now it is" in refusal({**before, "machine": other})
    rows = [{**before["rows"][0], "flags": "--T 4"}]
    assert "the study has no row 'static' of its flags" in refusal({**before, "rows": rows})
    assert "is not a record of a study" in refusal([])
    earlier.write_text("{")
    assert study.run_study(SMALL, [*more, "--finished"]) == 1
    assert "is not a record: Expecting property name" in capsys.readouterr().err


SEQUENCES = dataclasses.replace(
    sequence_study.STUDY,
    common="--dataset fashionmnist-mini --hidden_dim 32 --limit_train 96 --limit_test 32 --batch_size 32 --standardize",
)


def test_sequences_are_learned_by_networks_and_by_a_gru(tmp_path, capsys, monkeypatch, trained):
    costs = {"step_bytes": 3_000_000, "step_seconds": 0.0123}
    monkeypatch.setattr(step_costs, "_costs", lambda settings, build: costs)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    rows = ["rows, recurrent, 25 %", "rows, GRU"]
    arguments = ["--runs", str(tmp_path), "--seeds", "1", "--epochs", "1", "--json", str(tmp_path / "record.json")]
    assert study.run_study(SEQUENCES, [*arguments, "--rows", *rows]) == 0
    network, yardstick = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [network["row"], yardstick["row"]] == rows
    (found,) = yardstick["ends"]
    # hidden neurons are whole numbers: 8 have 1,002 weights, 9 have 1,153
    assert found["weights"] == pytest.approx(network["ends"][0]["weights"], rel=0.08)
    assert 0 <= found["test_acc"] <= 1
    printed = capsys.readouterr().out
    assert f"| rows, GRU | {found['weights']:,} | 3 MB | 12.3 ms |" in printed
    assert study.run_study(SEQUENCES, [*arguments, "--rows", *rows, "--finished"]) == 0
    assert capsys.readouterr().out == printed
    assert len(trained) == 1  # the network; the GRU is trained by the study itself

    # flags of every run: others, in another folder
    smaller = [*arguments, "--rows", *rows, "--flags", "--hidden_dim 16 --lr 0.01"]
    assert study.run_study(SEQUENCES, smaller) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["settings"] == f"{SEQUENCES.common} --hidden_dim 16 --lr 0.01"
    ends = [row["ends"][0]["weights"] for row in record["rows"]]
    assert ends[0] < network["ends"][0]["weights"] / 2
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    assert (tmp_path / "hidden-dim_16_-lr_0.01" / "sequence_study").is_dir()


def test_a_gru_that_was_stopped_goes_on_to_the_same_end(tmp_path):
    settings = study.run_of(SEQUENCES, "rows, GRU", 2, 1, tmp_path).settings
    products: list[float] = []
    tiny = torch.tensor(1e-30)
    whole = gru.train(settings, tmp_path / "whole", lambda line: products.append((tiny * 1e-10).item()))
    assert products == [0, 0]  # denormal numbers, which gradients over long sequences become, take too long
    assert tiny * 1e-10 != 0

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gru.train(settings, tmp_path / "stopped", stop)
    assert gru.finished(settings, tmp_path / "stopped") is None
    faster = dataclasses.replace(settings, lr=0.5)
    with pytest.raises(
        TrainingError, match=r"gru\.pt belongs to a run with different settings:\n  lr: .* there, 0\.5 now"
    ):
        gru.train(faster, tmp_path / "stopped")
    resumed = gru.train(settings, tmp_path / "stopped")
    assert {**resumed, "train_seconds": 0} == {**whole, "train_seconds": 0}
    assert gru.train(settings, tmp_path / "stopped") == resumed
    with pytest.raises(TrainingError, match=r"gru\.json belongs to a run with different settings"):
        gru.finished(faster, tmp_path / "stopped")
    states = [read_tensors(tmp_path / folder / "gru.pt")["net"] for folder in ("whole", "stopped")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("row", ["pixels, recurrent, 25 %", "rows, GRU"])
def test_the_memory_of_a_row_is_that_of_its_second_step(row, tmp_path, monkeypatch):
    """With a stand-in for the process's memory, which in this process may have been had before."""
    done = []
    adam = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: [adam(self), done.append("step")])

    class Memory:
        def __init__(self, device):
            done.clear()  # the step before is one of PyTorch's parts that are loaded on first use

        def restart(self):
            done.append("restart")

        def above(self):
            done.append("above")
            return 7

    monkeypatch.setattr(step_costs, "PeakMemory", Memory)
    settings = study.run_of(SEQUENCES, row, 1, 1, tmp_path).settings
    costs = step_costs._costs(settings, gru.build if row.endswith("GRU") else G2GNet.from_settings)
    assert costs["step_bytes"] == 7
    assert 0 < costs["step_seconds"] < 10
    assert done == ["step", "restart", "step", "above", "step", "step", "step"]


def test_the_costs_of_a_step_are_kept_for_the_seeds_of_the_same_settings(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(
        step_costs, "_costs", lambda settings, build: measured.append(settings) or {"step_bytes": settings.T}
    )
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    settings = TrainSettings(dataset="fashionmnist-mini", T=3)
    for seed in (1, 2):
        of_seed = dataclasses.replace(settings, seed=seed)
        assert step_costs.step_costs(of_seed, tmp_path / f"row-seed{seed}") == {"step_bytes": 3}
    assert len(measured) == 1
    others = dataclasses.replace(settings, T=4)
    assert step_costs.step_costs(others, tmp_path / "row-seed1") == {"step_bytes": 4}


def test_the_width_of_a_gru_has_the_weights_wanted():
    for width in (1, 17, 200):
        weights = sum(parameter.numel() for parameter in gru.GRU(4, width, 10).parameters())
        assert gru.width_of(weights, 4, 10) == width


CONVENTIONAL = dataclasses.replace(
    recipe_study.STUDY,
    common="--dataset fashionmnist-mini --model index --hidden_dim 64 --block_size 16 --T 3 --limit_train 96 "
    "--limit_test 32 --batch_size 32",
    rows={"20 epochs": "", "20 epochs, ReLU": "--name ReLU --dropout 0.2 --lr_schedule cosine"},
)


def test_a_conventional_network_stands_beside_the_spiking_one(tmp_path, capsys, monkeypatch, trained):
    arguments = ["--runs", str(tmp_path), "--seeds", "1", "--epochs", "3", "--json", str(tmp_path / "record.json")]
    assert study.run_study(CONVENTIONAL, arguments) == 0
    spiking, other = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert spiking["ends"][0]["weights"] == other["ends"][0]["weights"]  # of one seed: the same masks
    assert other["ends"][0]["accumulates"]["fc2"] == 0 < other["ends"][0]["multiplies"]["fc2"]
    assert set(other["ends"][0]["silent"]) == {"lif1", "lif2", "lif3"}
    printed = capsys.readouterr()
    assert "row=20 epochs, ReLU, seed=1: epoch 3: test accuracy" in printed.err
    assert "Epoch" not in printed.out
    # a finished one is not trained again
    again = dataclasses.replace(CONVENTIONAL, others={"20 epochs, ReLU": lambda *_: pytest.fail("trained")})
    assert study.run_study(again, [*arguments, "--finished"]) == 0


@pytest.mark.parametrize(
    ("flags", "trainer", "train"),
    [
        ("--dropout 0.2 --lr_schedule cosine", relu.ReLUTrainer, relu.train),
        ("--block_size 1 --lr_schedule cosine", deep_r.DeepRTrainer, deep_r.train),
    ],
)
def test_a_trainer_of_a_studys_own_resumes_with_the_same_weights(tmp_path, monkeypatch, flags, trainer, train):
    of_rows = dataclasses.replace(CONVENTIONAL, rows={"row": f"--name own {flags}"})
    settings = study.run_of(of_rows, "row", 3, 1, tmp_path).settings
    end = train(settings, tmp_path / "whole")
    assert end == own_trainer.finished(settings, tmp_path / "whole")
    assert end["epoch"] == 3
    assert end["units_pruned"] == end["units_grown"]
    assert (end["units_grown"] > 0) == (trainer is deep_r.DeepRTrainer)

    def stop_in_epoch_two(self, on_step=None, train_epoch=trainer.train_epoch):
        if self.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(self, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", stop_in_epoch_two)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "parts")
    assert own_trainer.finished(settings, tmp_path / "parts") is None
    train(settings, tmp_path / "parts")
    whole, parts = (read_tensors(*(tmp_path / name).glob("*.pth")) for name in ("whole", "parts"))
    assert_equal(whole, parts)
    for of in (train, own_trainer.finished):
        with pytest.raises(CheckpointError, match=r"different settings:\n  lr: 0\.001 there, 0\.002 now"):
            of(dataclasses.replace(settings, lr=0.002), tmp_path / "whole")


def test_deep_r_replaces_weights_that_cross_zero():
    draw = torch.Generator().manual_seed(0)
    mask = BlockMask.sample(GroupLayout(40), GroupLayout(56), p_inter=0.1, block_size=1, generator=draw)
    layer = G2GLinear(mask, bias=False, generator=draw)
    optimizer = torch.optim.Adam([layer.values], lr=0.05)
    rewiring = deep_r.DeepR([layer], optimizer, seed=1)
    sign, count = torch.zeros(40, 56), mask.num_units  # of connections that had a weight, so far
    for _ in range(8):
        sign = torch.where(sign == 0, layer.dense_weight().detach().sign(), sign)
        layer.values.grad = torch.randn(layer.values.shape, generator=draw)
        optimizer.step()
        trained, was_there, replaced = layer.dense_weight().detach(), layer.mask.to_dense(), rewiring.grown
        rewiring.step()
        weight, there = layer.dense_weight().detach(), layer.mask.to_dense()
        moments = layer.mask.unpack(optimizer.state[layer.values]["exp_avg"])
        forced = trained - 0.05 * deep_r.FORCE * sign
        known, grown, pruned = was_there & (sign != 0), there & ~was_there, was_there & ~there
        torch.testing.assert_close(there[known], (forced * sign >= 0)[known])
        torch.testing.assert_close(weight[known & there], forced[known & there])
        assert not weight[grown].any()
        assert not moments[grown].any()
        assert moments[there & ~grown].all()
        assert there.sum() == count
        assert grown.sum() == pruned.sum() == rewiring.grown - replaced > 0
        assert (weight * sign >= 0).all()  # also of those that have come back
    assert rewiring.pruned == rewiring.grown
    units = G2GLinear(BlockMask.sample(GroupLayout(40), GroupLayout(56), block_size=4, generator=draw))
    with pytest.raises(ValueError, match="block_size=1"):
        deep_r.DeepR([units], torch.optim.Adam(units.parameters()), seed=1)


def test_a_conventional_network_is_a_perceptron_with_the_masks():
    net = relu.ReLUNet(784, 64, 10, block_size=16, dropout=0.5, generator=torch.Generator().manual_seed(0))
    x = torch.rand(40, 784)
    dropped = net.drop(40)
    dense = [
        (connection.dense_weight().detach().double(), connection.bias.detach().double())
        for connection, _ in net.layers()
    ]
    for training in (False, True):
        net.train(training)
        activity = net.simulate(x, dropped=dropped)
        hidden, rates, multiplies = x.double(), [], []
        for number, (weight, bias) in enumerate(dense):
            multiplies.append(int((hidden != 0).long().sum(0) @ (weight != 0).long().sum(0)))
            logits = hidden @ weight.T + bias
            hidden = logits.relu()
            if training and number < 2:
                hidden = hidden * ~dropped[number] * 2
            rates.append((hidden > 0).double().mean(0))
        torch.testing.assert_close(activity.output.double(), logits, rtol=1e-5, atol=1e-5)
        for found, wanted in zip(activity.rates, rates, strict=True):
            assert (found - wanted).abs().max() < 1 / 39  # one sample at zero may be on either side
        if not training:
            assert [each.multiplies for each in activity.synaptic_operations()] == pytest.approx(multiplies, rel=1e-3)


@pytest.mark.parametrize("weights", few_study.DENSE_WIDTHS)
def test_networks_of_few_weights_have_no_more_and_hardly_fewer(weights, tmp_path):
    def of_dense(width):
        return width * (28 * 28 + width + 10)

    width = few_study.DENSE_WIDTHS[weights]
    assert of_dense(width) <= weights < of_dense(width + 1)
    for way in ("units of 1", "units of 1, ERK"):
        settings = study.run_of(few_study.STUDY, f"{weights:,} weights, H 512, {way}", 1, 1, tmp_path).settings
        net = G2GNet.from_settings(settings, 28 * 28, 10, generator=torch.Generator().manual_seed(1))
        found = sum(connection.mask.num_weights for connection in net.connections().values())
        assert 0.985 * weights < found <= weights, way
    settings = study.run_of(
        few_study.STUDY, f"{weights:,} weights, H 1024, units of 1, gradual", 1, 1, tmp_path
    ).settings
    assert 0.99 * weights < settings.final_density * of_dense(1024) <= weights


def test_memory_stands_beside_few_weights():
    row = "58,000 weights, dense, 67"
    text = few_study.table({"rows": [{"row": row, "ends": [{**end(1, 0.88), "train_acc": 0.93, "step_bytes": 2.1e7}]}]})
    line = "| 1,234,567 | 88.00 (n = 1) | 93.00 (n = 1) | 10, 30 | 10 (n = 1) | 21 MB |"
    assert f"| {row} {line}" in text


def test_what_cannot_be_is_named(tmp_path, capsys):
    for arguments, message in (
        (["--rows", "statical"], "--rows 'statical' matches none of the rows, which --help lists"),
        (
            ["--validation", "--seeds", "1", "2", "7"],
            "--validation holds back the same images with seeds 1 and 7; give",
        ),
        (["--validation", "--flags", "--dataset cifar10"], "--validation is of Fashion-MNIST; leave --dataset out"),
        (["--validation", "--flags=--dataset=cifar10"], "--validation is of Fashion-MNIST; leave --dataset out"),
        (["--flags", "--lr 0.1 --epochs 3"], "--epochs has no effect there; give the study --epochs"),
        (["--flags=--seed=3"], "--seed has no effect there; give the study --seeds"),
        (["--flags", "--cg random", "--rows", "gradient"], "--cg has no effect, since every row has one of its own"),
        (["--validation", "--finished"], "no run of small_study is finished"),
        (["--finished"], "no run of small_study is finished"),
    ):
        assert study.run_study(SMALL, ["--runs", str(tmp_path), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert study.run_study(SMALL, ["--runs", str(tmp_path), "--validation", "--seeds", "-1"]) == 2
    assert "seed=-1 must be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    broken = Study("broken", "", "--dataset fashionmnist-mini --model ring", {"ring": ""}, 1, lambda record: "")
    with pytest.raises(SystemExit):
        study.run_study(broken, ["--runs", str(tmp_path), "--seeds", "1"])
    assert "invalid choice: 'ring'" in capsys.readouterr().err


def end(seed, accuracy, seconds=10.0):
    layer = {"rows_spread": 0.1, "cols_spread": 0.2, "rows_empty": 0.25, "cols_empty": 0.0, "inside": 0.5}
    return {
        "seed": seed,
        "test_acc": accuracy,
        "train_acc": accuracy,
        "silent": {"lif1": 0.1, "lif2": 0.3, "lif3": 0.0},
        "weights": 1234567,
        "train_seconds": seconds,
        "train_cpu_seconds": seconds,
        "placement": {"fc1": layer, "fc2": layer, "fc3": layer},
    }


def test_the_best_growth_is_held_against_static_with_the_error_of_the_difference():
    rows = {
        "units of 16, 5 %, static": (0.86, 0.87, 0.88),
        "units of 16, 5 %, random": (0.88, 0.89, 0.9),
        "units of 16, 5 %, gradient": (0.89,),
        "units of 1, 5 %, static": (0.88,),
        "units of 1, 5 %, random": (0.87, 0.88),
    }
    record = {"rows": [{"row": row, "ends": [end(s, a) for s, a in enumerate(found)]} for row, found in rows.items()]}
    text = dst_study.table(record)
    # standard error 1/√3 of each
    line = "| 16 | 5 % | 87.00 ± 0.58 | 89.00 ± 0.58 | – | 89.00 (n = 1) | +2.00 ± 0.82 (random) |"
    assert line in text
    assert "| 1 | 5 % | 88.00 (n = 1) | 87.50 ± 0.50 (n = 2) | – | – | -0.50 (random) |" in text  # an error is unknown
    assert "| 16 | 5 % | gradient | 10, 30 | 0.10, 0.20 | 25 % | 50 % |" in text


def test_graphs_are_held_against_the_control_seed_by_seed():
    size = "H 1024, 5 %, units of 16"
    control = {1: 0.86, 2: 0.87, 3: 0.89, 4: 0.85}
    graphs = {
        "regular": control,
        "index": {1: 0.87, 2: 0.885, 3: 0.893, 5: 0.5},  # +1.0, +1.5, +0.3; seed 5 has no partner
        "mixer": {1: 0.861, 2: 0.868, 3: 0.89},  # +0.1, -0.2, 0.0
        "distance": {1: 0.9},
    }
    rows = [
        {"row": f"{graph}, {size}", "ends": [end(s, a) for s, a in found.items()]} for graph, found in graphs.items()
    ]
    lines = structure_study.table({"rows": rows}).split("\n")
    p = {
        graph: stats.ttest_rel([graphs[graph][s] for s in (1, 2, 3)], [control[s] for s in (1, 2, 3)]).pvalue
        for graph in ("index", "mixer")
    }
    assert p["index"] < p["mixer"] / 2  # so Holm's doubles it, and leaves the other
    # 0.93 ± 4.303 · 0.603 / √3
    assert f"| index | 1,234,567 | 78.70 ± 9.58 (n = 4) | +0.93 | -0.56 to +2.43 | {2 * p['index']:.2g} |" in lines
    assert f"| mixer | 1,234,567 | 87.30 ± 0.87 | -0.03 | -0.41 to +0.35 | {p['mixer']:.2g} |" in lines
    assert "| distance | 1,234,567 | 90.00 (n = 1) | – | – | – |" in lines
    assert "All sizes together" not in "".join(lines)

    # all sizes together are as many values as there are sizes: their seeds are no sample of sizes
    others = {
        "10 %": {"regular": {1: 0.9, 2: 0.8}, "index": {1: 0.91, 2: 0.81}, "mixer": {1: 0.9, 2: 0.81}},
        "25 %": {"regular": {1: 0.9}, "index": {1: 0.88}, "mixer": {1: 0.9}, "distance": {2: 0.9}},
    }
    rows += [
        {"row": f"{graph}, {size.replace('5 %', share)}", "ends": [end(seed, value) for seed, value in of.items()]}
        for share, graphs in others.items()
        for graph, of in graphs.items()
    ]
    text = structure_study.table({"rows": rows})
    assert f"| +0.93 | -0.56 to +2.43 | {3 * p['index']:.2g} |" in text  # of three tests: two of mixer, this one
    assert "| index | 1,234,567 | 86.00 ± 5.00 (n = 2) | – | – | – |" in text  # by the same twice: nothing to test
    pooled = text.split("**All sizes together**")[1]
    for graph, of in (("index", (2.8 / 3, 1.0, -2.0)), ("mixer", (-0.1 / 3, 0.5, 0.0))):
        found = stats.ttest_1samp(of, 0).confidence_interval()
        assert f"| {graph} | 3 | {sum(of) / 3:+.2f} | {found.low:+.2f} to {found.high:+.2f} | 0.9" in pooled
    assert "distance" not in pooled  # of one size


def test_parts_of_the_recipe_are_compared_seed_by_seed_with_runs_of_as_many_epochs():
    found = {
        "the recipe": {1: 0.9},
        "20 epochs": {1: 0.88, 2: 0.89},
        "T 5": {1: 0.87, 2: 0.886, 3: 0.7},  # -1.0, -0.4; seed 3 has no partner
        "40 epochs, H 2048": {1: 0.91},
        "80 epochs, second recipe, H 2048": {1: 0.92},
    }
    epochs = {row: int(row[:2]) if row[:2].isdigit() else 20 for row in found} | {"the recipe": 40}
    rows = [
        {"row": row, "ends": [end(seed, value) | {"epoch": epochs[row]} for seed, value in of.items()]}
        for row, of in found.items()
    ]
    lines = [line.split(" | ") for line in recipe_study.table({"rows": rows}).split("\n")[2:]]
    assert [line[3] for line in lines] == ["–", "–", "-0.70 ± 0.30 (n = 2)", "+1.00", "–"]


def test_p_values_are_corrected_as_by_holm():
    assert structure_study.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert structure_study.holm([0.7, 0.9]) == [1.0, 1.0]


def test_the_best_network_within_a_budget():
    runs = {
        "dense, 64": (60_000, 20, 0.86),
        "dense, 1024": (2_000_000, 700, 0.92),
        "index, 512, 25 %, units of 64": (90_000, 30, 0.88),
        "index, 1024, 10 %, units of 16": (95_000, 90, 0.87),
        "index, 1024, 25 %, units of 64": (150_000, 100, 0.9),
    }
    rows = [
        {"row": row, "ends": [{**end(1, accuracy), "weights": weights, "train_cpu_seconds": seconds}]}
        for row, (weights, seconds, accuracy) in runs.items()
    ]
    text = tradeoff_study.table({"rows": rows})
    assert "| dense, 64 | 60,000 | 20 (n = 1) | 86.00 (n = 1) |" in text
    small = "86.00 (n = 1): dense, 64 | 88.00 (n = 1): index, 512, 25 %, units of 64"
    large = "86.00 (n = 1): dense, 64 | 90.00 (n = 1): index, 1024, 25 %, units of 64"
    assert f"| 100,000 weights | {small} |" in text
    assert f"| 300,000 weights | {large} |" in text
    assert f"| 60 processor seconds | {small} |" in text
    assert f"| 600 processor seconds | {large} |" in text
    assert tradeoff_study.best({"rows": rows[1:2]}, "dense", "weights", 100_000) is None
