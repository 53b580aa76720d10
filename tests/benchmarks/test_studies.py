"""Studies of training: what they run, that they go on where they stopped, and what they say of it."""

import contextlib
import dataclasses
import functools
import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import seeded
from scipy import stats
from torch.nn import functional as F
from training_runs import assert_equal

from benchmarks import conventional, records, study, study_tables
from benchmarks.studies import STUDIES, Study
from g2gnet.base.tensor_files import read_tensors
from g2gnet.training import CheckpointError

SIZES = "--dataset fashionmnist-mini --limit_train 96 --limit_test 32 --batch_size 32"
ROWS = {"static": "", "gradient": "--sparsity_mode dynamic --cg gradient --dst_interval 1 --dst_schedule cosine"}
SETTINGS = f"{SIZES} --model index --hidden_dim 64 --block_size 16 --T 3 --enc_scale 3"
COLUMNS = ("", "test accuracy, %", "spread", "rows empty", "inside")
SMALL = Study("A study of three steps.", "no time", SETTINGS, ROWS, 1, COLUMNS)
SEQUENCES = dataclasses.replace(STUDIES["sequence"], common=f"{SIZES} --hidden_dim 32 --standardize")


@pytest.fixture
def trained(monkeypatch):
    """Has studies, the ones above too, train in a thread of this process; the folders of the runs, as they begin."""
    began = []

    class Pool(ThreadPoolExecutor):
        def submit(self, function, given, folder):
            began.append(folder)
            return super().submit(function, given, folder)

    monkeypatch.setattr(study, "processes", lambda jobs, threads: Pool(1))
    monkeypatch.setattr(study, "step_costs", lambda run: {"step_bytes": 3_000_000, "step_seconds": 0.0123})
    for name, each in {"small": SMALL, "sequence": SEQUENCES}.items():
        monkeypatch.setitem(STUDIES, name, each)
    return began


@pytest.fixture
def studied(tmp_path, trained):
    """The record that a study's program writes, given these flags."""

    def run(flags: str) -> dict:
        written = "--runs", str(tmp_path), "--json", str(tmp_path / "record.jsonl")
        assert study.main([*shlex.split(flags), *written]) == 0
        return records.read(tmp_path / "record.jsonl")

    return run


@pytest.mark.ci
@pytest.mark.parametrize("name", STUDIES)
def test_every_row_is_a_run_that_train_takes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(study.train, "build_parser", functools.cache(study.train.build_parser))
    each, seen, folders = STUDIES[name], set(), set()
    for row, flags in each.rows.items():
        run = study.run_of(each, row, each.epochs, 1, tmp_path)
        own = re.search(r"--epochs (\d+)", flags)
        assert run.settings.epochs == (int(own[1]) if own else each.epochs)
        assert study.run_of(each, row, 2, 1, tmp_path, last=study.QUICK).settings.limit_train == 2000
        seen.add(json.dumps(run.settings.as_dict()))
        folders.add(run.folder)
    assert len(seen) == len(folders) == len(each.rows)  # no two of them are the same run
    assert study.chosen(each, each.default_rows)
    assert set(each.columns) <= study_tables.COLUMNS.keys()


def test_a_study_goes_on_where_it_stopped_and_records_what_there_is(tmp_path, capsys, trained, studied):
    for more in ("--rows gradient", "--finished"):
        assert [run["row"] for run in studied(f"small --seeds 1 {more}")["runs"]] == ["gradient"]
        assert len(trained) == 1
    record = studied("small --seeds 1")
    assert len(trained) == 2  # the other one was finished
    assert (record["rows"], record["machine"]["threads"]) == (SMALL.rows, 1)
    _, run = record["runs"]
    assert (run["row"], run["seed"], run["epoch"]) == ("gradient", 1, 1)
    assert min(run["train_seconds"], run["train_cpu_seconds"]) > 0
    (file,) = (tmp_path / "small_study").glob("gradient*/*.jsonl")
    (epoch,) = map(json.loads, file.read_text().splitlines())
    sizes = {"fc1": 784 * 64, "fc2": 64 * 64, "fc3": 640}
    assert run["weights"] == sum(round(epoch["density"][name] * size) for name, size in sizes.items())
    assert run["silent"] == pytest.approx([epoch["silent"][name] for name in ("lif1", "lif2")], abs=1e-5)
    assert set(run["placement"]) == {"rows_spread", "cols_spread", "rows_empty", "cols_empty", "inside"}
    assert f"| gradient | {100 * run['test_acc']:.2f} (n = 1) |" in capsys.readouterr().out


def test_validation_tests_on_training_images_that_are_held_back(tmp_path, studied):
    record = studied("sequence --seeds 1 2 --epochs 1 --rows 'rows, feed-forward, 25 %' 'rows, GRU' --validation")
    assert record["tested_on"] == study_tables.DRAWN
    for run in record["runs"]:
        name = f"{run['row'].replace(', ', '-').removesuffix(' %')}-1-epochs-seed{run['seed']}"
        (file,) = (tmp_path / "validation/sequence_study" / name).glob("*.DONE")
        marker = json.loads(file.read_text())
        assert run["test_acc"] == marker["result"]["val_acc"]
        assert marker["settings"]["validation"] == pytest.approx(1 / 6, abs=1e-4)
        assert marker["settings"]["validation_seed"] == run["seed"]
    assert not (tmp_path / "sequence_study").exists()  # runs that are tested on test images are others


def test_sequences_are_learned_by_networks_and_by_a_gru(tmp_path, capsys, trained, studied):
    flags = "sequence --seeds 1 --epochs 1 --rows 'rows, recurrent, 25 %' 'rows, GRU'"
    network, yardstick = studied(flags)["runs"]
    assert [network["row"], yardstick["row"]] == ["rows, recurrent, 25 %", "rows, GRU"]
    # hidden neurons are whole numbers: 8 have 1,002 weights, 9 have 1,153
    assert yardstick["weights"] == pytest.approx(network["weights"], rel=0.08)
    assert 0 <= yardstick["test_acc"] <= 1
    printed = capsys.readouterr().out
    assert f"| rows, GRU | {yardstick['weights']:,} | 3 MB | 12.3 ms |" in printed
    studied(f"{flags} --finished")
    assert capsys.readouterr().out == printed
    assert len(trained) == 1  # the network; the GRU is trained by the study itself

    # flags of every run: others, in another folder
    record = studied(f"{flags} --flags '--hidden_dim 16 --lr 0.01'")
    assert record["settings"] == f"{SEQUENCES.common} --hidden_dim 16 --lr 0.01"
    smaller, other = (run["weights"] for run in record["runs"])
    assert smaller < network["weights"] / 2
    assert other == pytest.approx(smaller, rel=0.1)
    assert (tmp_path / "hidden-dim-16-lr-0.01" / "sequence_study").is_dir()


def test_a_trainer_of_a_studys_own_resumes_with_the_same_weights(tmp_path, monkeypatch):
    trainer = conventional.ReLUTrainer
    of_rows = dataclasses.replace(SMALL, rows={"ReLU": "--name own --dropout 0.2 --lr_schedule cosine"})
    whole, parts = (study.run_of(of_rows, "ReLU", 3, 1, tmp_path / name) for name in ("whole", "parts"))
    study.train_own(whole)
    assert study.result(whole)["epoch"] == 3

    def stop_in_epoch_two(self, on_step=None, train_epoch=trainer.train_epoch):
        if self.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(self, on_step)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(trainer, "train_epoch", stop_in_epoch_two)
        study.train_own(parts)
    assert study.result(parts) is None
    study.train_own(parts)
    assert_equal(*(read_tensors(*run.folder.glob("*.pth")) for run in (whole, parts)))
    other = dataclasses.replace(whole, settings=dataclasses.replace(whole.settings, lr=0.002))
    for of in (study.train_own, study.result):
        with pytest.raises(CheckpointError, match=r"different settings:\n  lr: 0\.001 there, 0\.002 now"):
            of(other)


def test_a_conventional_network_is_a_perceptron_with_the_masks():
    net = conventional.ReLUNet(784, 64, 10, block_size=16, dropout=0.5, generator=seeded(0))
    x, dropped = torch.rand(40, 784), net.drop(40)
    dense = [(each.dense_weight().detach().double(), each.bias.detach().double()) for each, _ in net.layers()]
    for training in (True, False):
        net.train(training)
        activity = net.simulate(x, dropped=dropped)
        hidden, multiplies = x.double(), []
        for number, (weight, bias) in enumerate(dense):
            multiplies.append(int((hidden != 0).long().sum(0) @ (weight != 0).long().sum(0)))
            logits = hidden @ weight.T + bias
            hidden = logits.relu() * (~dropped[number] * 2 if training and number < 2 else 1)
            rate = (hidden > 0).double().mean(0)
            assert (activity.rates[number] - rate).abs().max() < 1 / 39  # one sample at zero may be on either side
        torch.testing.assert_close(activity.output.double(), logits, rtol=1e-5, atol=1e-5)
    assert [each.multiplies for each in activity.synaptic_operations()] == pytest.approx(multiplies, rel=1e-3)


def test_a_conventional_network_of_images_pools_what_relu_gives():
    options = {"layers": "4C3-P2-6C3-AP2", "p_intra": 0.5, "num_groups": 1, "block_size": 1}
    net = conventional.ReLUNet((1, 8, 8), None, 5, "regular", generator=seeded(0), **options)
    x = torch.rand(20, 64)
    (first, second, last) = [(each.dense_weight().double(), each.bias.double()) for each, _ in net.layers()]
    pooled = F.max_pool2d(F.conv2d(x.view(20, 1, 8, 8).double(), *first, padding=1).relu(), 2)
    pooled = F.avg_pool2d(F.conv2d(pooled, *second, padding=1).relu(), 2)
    activity = net.simulate(x)
    torch.testing.assert_close(activity.output.double(), F.linear(pooled.flatten(1), *last), rtol=1e-5, atol=1e-6)
    counts = [int((weight != 0).sum()) for weight, _ in (first, second, last)]
    assert [each.multiplies for each in activity.synaptic_operations()] == [64 * counts[0], 16 * counts[1], counts[2]]


def test_what_cannot_be_is_named(tmp_path, capsys, trained, monkeypatch):
    monkeypatch.setitem(STUDIES, "ring", dataclasses.replace(SMALL, rows={"ring": "--model ring"}))
    for flags, status, message in (
        ("small --rows statical", 1, "--rows 'statical' matches none of the rows, which --help lists"),
        ("small --finished", 1, "no run of small is finished"),
        ("small --validation --seeds -1", 2, "seed=-1 must be"),
        ("ring --seeds 1", 2, "='ring' is unknown"),
        ("smal", 2, "='smal' is unknown"),
    ):
        with contextlib.suppress(SystemExit):  # of a parser
            assert study.main([*flags.split(), *(["--runs", str(tmp_path)] if " " in flags else [])]) == status
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quick_is_small_whatever_a_row_says(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "make", lambda name, given: asked.append(given) or {"benchmark": name, "runs": []})
    assert study.main(["recipe", "--quick"]) == study.main(["recipe", "--quick", "--seeds", "4"]) == 0
    assert [(arguments.seeds, arguments.last) for arguments in asked] == [([1], study.QUICK), ([4], study.QUICK)]
    quick = study.runs_of("recipe", STUDIES["recipe"], asked[0])
    assert {(run.settings.epochs, run.settings.limit_train) for run in quick} == {(1, 2000)}


def made(rows):
    """A record of the study of structure with runs by row and seed: their accuracies."""
    runs = [
        {"row": row, "seed": seed, "test_acc": reached, "weights": 1234567, "epoch": 20}
        for row, of in rows.items()
        for seed, reached in of.items()
    ]
    return {"benchmark": "structure", "rows": dict.fromkeys(rows, "--lr 1"), "runs": runs}


def test_graphs_are_held_against_the_control_seed_by_seed():
    size = "H 1024, 5 %, units of 16"
    control = {1: 0.86, 2: 0.87, 3: 0.89, 4: 0.85}
    graphs = {
        "regular": control,
        "index": {1: 0.87, 2: 0.885, 3: 0.893, 5: 0.5},  # +1.0, +1.5, +0.3; seed 5 has no partner
        "mixer": {1: 0.861, 2: 0.868, 3: 0.89},  # +0.1, -0.2, 0.0
        "distance": {1: 0.9},
    }
    rows = {f"{graph}, {size}": found for graph, found in graphs.items()}
    text = study_tables.table(made(rows))
    index, mixer = (
        stats.ttest_rel(*([of[seed] for seed in (1, 2, 3)] for of in (graphs[graph], control))).pvalue
        for graph in ("index", "mixer")
    )
    assert index < mixer / 2  # so Holm's doubles it, and leaves the other
    # 0.93 ± 4.303 · 0.603 / √3
    assert f"| index | 1,234,567 | 78.70 ± 9.58 (n = 4) | +0.93 | -0.56 to +2.43 | {2 * index:.2g} |\n" in text
    assert f"| mixer | 1,234,567 | 87.30 ± 0.87 | -0.03 | -0.41 to +0.35 | {mixer:.2g} |\n" in text
    assert "| distance | 1,234,567 | 90.00 (n = 1) | – | – | – |" in text
    assert "All sizes together" not in text

    # all sizes together are as many values as there are sizes: their seeds are no sample of sizes
    others = {
        "10 %": {"regular": {1: 0.9, 2: 0.8}, "index": {1: 0.91, 2: 0.81}, "mixer": {1: 0.9, 2: 0.81}},
        "25 %": {"regular": {1: 0.9}, "index": {1: 0.88}, "mixer": {1: 0.9}, "distance": {2: 0.9}},
    }
    for share, of_share in others.items():
        rows |= {f"{graph}, {size.replace('5 %', share)}": of for graph, of in of_share.items()}
    text, pooled = study_tables.table(made(rows)).split("**All sizes together**")
    assert f"| +0.93 | -0.56 to +2.43 | {3 * index:.2g} |" in text  # of three tests: two of mixer, this one
    assert "| index | 1,234,567 | 86.00 ± 5.00 (n = 2) | – | – | – |" in text  # by the same twice: nothing to test
    for graph, of in (("index", (2.8 / 3, 1.0, -2.0)), ("mixer", (-0.1 / 3, 0.5, 0.0))):
        found = stats.ttest_1samp(of, 0).confidence_interval()
        assert f"| {graph} | 3 | {sum(of) / 3:+.2f} | {found.low:+.2f} to {found.high:+.2f} | 0.9" in pooled
    assert "distance" not in pooled  # of one size
    assert study_tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert study_tables.holm([0.7, 0.9]) == [1.0, 1.0]
