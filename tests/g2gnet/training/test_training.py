"""The training engine on a few real images: what it writes, how it goes on, and what it refuses."""

import dataclasses
import json
import math

import pytest
import torch
from small_data import write_own
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SMALL, VARIANTS, assert_equal, load, run, small_trainer

from benchmarks.machine import pytorch_threads
from g2gnet.base.seeding import stream
from g2gnet.base.tensor_files import write_tensors
from g2gnet.data import (
    DataError,
    as_samples,
    dataset_name,
    load_dataset,
    random_crop_and_flip,
    random_erase,
    random_unit_shift,
)  # fmt: skip
from g2gnet.training import CheckpointError, Machine, SettingsError, Trainer, TrainSettings, read_run
from g2gnet.training import trainer as trainer_module
from g2gnet.training.evaluation import build_network

DYNAMIC = {"sparsity_mode": "dynamic"}


def cropped_and_erased(images, step):
    return random_erase(random_crop_and_flip(images, stream(42, "augment", step)), stream(42, "erase", step), 0.5)


def shifted(sequences, step):
    return random_unit_shift(sequences, stream(42, "unit_shift", step), 2)


@pytest.mark.parametrize("changed", [cropped_and_erased, shifted])
def test_each_batch_is_changed_with_the_draws_of_its_step_and_test_samples_are_not(tmp_path, changed):
    options, data = {"augment": "crop-flip", "erase": 0.5}, None
    if changed is shifted:
        name = dataset_name(write_own(tmp_path / "mine.npz", 6, 9))
        options, data = {"dataset": name, "sequence": "own", "T": 6, "unit_shift": 2}, load_dataset(name)
    trainer, seen = small_trainer(data, **options, batch_size=20), []
    data, encode = trainer.data, trainer.net.encode
    trainer.net.encode = lambda x, *rest: seen.append(x) or encode(x, *rest)
    trainer.train_epoch()
    order = torch.randperm(len(data.train_labels), generator=stream(42, "order", 1))
    for step, index in enumerate(order.split(20)):
        assert torch.equal(seen[step], as_samples(changed(data.train_images[index], step)))
    assert torch.equal(torch.cat(seen[step + 1 :]), as_samples(data.test_images))


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(warmup):
    """Of 12 steps in 3 epochs the first rise by lr/(1 + warm-up) each; the cosine falls over the others, from lr on."""
    trainer, rates, left = small_trainer(lr_schedule="cosine", lr_warmup=warmup), [], 12 - warmup
    for _ in range(3):
        trainer.train_epoch(lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    rising = [1e-3 * step / (warmup + 1) for step in range(1, warmup + 1)]
    assert rates == pytest.approx(rising + [1e-3 * (1 + math.cos(math.pi * s / left)) / 2 for s in range(left)])


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_learned_delays_have_a_learning_rate_of_their_own_and_no_decay(optimizer):
    schedule = {"optimizer": optimizer, "lr_schedule": "cosine", "weight_decay": 0.1}
    schedule |= {"delay_width": 9, "delay_width_schedule": "cosine"}
    trainer, widths = small_trainer(**schedule, delay=3, learn_delay=True, delay_lr_factor=20.0), []
    delays = [each for name, each in trainer.net.named_parameters() if name.endswith("delay")]
    before = [each.detach().clone() for each in delays]
    trainer.train_epoch(lambda *_: widths.append(trainer.net.delay_width))
    assert widths == [9, 9, 8, 8]  # 1 + 8·(1 + cos(π·step/12))/2, rounded
    *others, of_delays = trainer.optimizer.param_groups
    assert {id(each) for each in of_delays["params"]} == {id(each) for each in delays}
    assert of_delays["weight_decay"] == 0
    assert of_delays["lr"] == 20 * others[0]["lr"] > 0
    assert all((now - old).abs().max() > 4e-3 for now, old in zip(delays, before, strict=True))


def test_adaptive_neurons_stay_stable_in_training():
    trainer = small_trainer(neuron="adlif", per_neuron=True)
    neurons = trainer.net.lif1
    neurons.a.data.fill_(-0.5)
    trainer.train_epoch()
    assert (neurons.a >= -(1 - neurons.adapt_decay.clamp(0, 1)) * (1 - neurons.beta.clamp(0, 1))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warmup": 12}, "lr_warmup=12 leaves no step at `lr`: training takes 12 steps; lower"),
        ({**DYNAMIC, "dst_stop": 0.5, "dst_interval": 7}, r": dst_interval=7 leaves no update in the first 0\.5 of 12"),
        ({"sequence": "rows", "T": 50}, "T=50 is not the length of the sequences .* with sequence=rows; give `T=28`"),
        ({"sequence": "pixels", "sequence_step": 5}, "sequence_step=5 does not divide the 784 pixels of an image"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_its_first_step(options, message):
    with pytest.raises(SettingsError, match=message):
        small_trainer(**options)


ONE_STEP = {"batch_size": 200, "epochs": 1}


def test_smoothed_labels_give_each_class_its_share_of_the_loss():
    """0.3 spread over 10 classes: 0.73 for the label's class and 0.03 for each other."""
    trainer = small_trainer(**ONE_STEP, label_smoothing=0.3)
    with torch.no_grad():
        scores = trainer.net(as_samples(trainer.data.train_images)).double().log_softmax(1)
    wanted = 0.03 + 0.7 * torch.nn.functional.one_hot(trainer.data.train_labels, 10)
    assert trainer.train_epoch()["train_loss"] == pytest.approx(-(wanted * scores).sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, 1e30])
def test_a_gradient_is_scaled_down_to_the_largest_norm(factor):
    """Even one whose squares overflow float32."""

    def gradients(**options):
        trainer = small_trainer(**ONE_STEP, **options)
        trainer.net.fc3.values.register_hook(lambda gradient: gradient * factor)
        found, named = {}, dict(trainer.net.named_parameters())
        trainer.optimizer.register_step_pre_hook(lambda *_: found.update({n: p.grad for n, p in named.items()}))
        trainer.train_epoch()
        assert all(parameter.grad is None for parameter in named.values())
        return found

    whole = gradients()
    norm = torch.cat([gradient.flatten().double() for gradient in whole.values()]).norm().item()
    for largest in (0.1, 0.1 * norm, 10 * norm):
        wanted = {name: (gradient.double() * min(1, largest / norm)).float() for name, gradient in whole.items()}
        # the norm is summed in float32, and 1e-6 is added to it; smaller than 1e-38 have fewer bits
        torch.testing.assert_close(gradients(clip_grad_norm=largest), wanted, rtol=1e-4, atol=1e-38)


def test_a_decoupled_decay_takes_its_share_of_connections_alone():
    before = small_trainer(**ONE_STEP).net.state_dict()
    plain = small_trainer(**ONE_STEP, weight_decay=0.0, lr=0.01)
    decayed = small_trainer(**ONE_STEP, weight_decay=0.5, lr=0.01, optimizer="adamw")
    for trainer in (plain, decayed):
        trainer.train_epoch()
    for (name, without), found in zip(plain.net.named_parameters(), decayed.net.parameters(), strict=True):
        taken = 0.01 * 0.5 * before[name] if name.endswith("values") else torch.zeros(())
        assert not torch.equal(without, before[name])
        torch.testing.assert_close(found, without - taken, rtol=0, atol=6e-8 if name.endswith("values") else 0)


def test_the_average_is_the_mean_of_all_steps_and_then_of_about_the_last_and_follows_rewiring():
    trainer = small_trainer(average=3, sparsity_mode="dynamic", dst_interval=2, cg="random", lr=0.03)
    before = weights_of(trainer.net)
    expected = {name: tensor.double() for name, tensor in before.items()}
    seen, rewired = 0, 0

    def add(*_):
        nonlocal seen, rewired
        seen += 1
        for name, now in weights_of(trainer.net).items():
            expected[name] += (now.double() - expected[name]) / min(seen, 3)
            # a new unit begins at zero in both, a lost one is in neither
            there = (now != 0) & (before[name] != 0) if name.startswith("fc") else True
            rewired += int((expected[name][now == 0] != 0).sum()) if now.ndim == 2 else 0
            expected[name] *= there
        before.update(weights_of(trainer.net))

    for _ in range(2):
        trainer.train_epoch(add)
    assert seen == 8
    assert rewired > 0
    for name, found in weights_of(trainer.tested).items():
        torch.testing.assert_close(found.double(), expected[name], rtol=0, atol=1e-7, msg=name)
        assert not torch.equal(found, weights_of(trainer.net)[name])


def weights_of(net):
    weights = {name: connection.dense_weight().detach().clone() for name, connection in net.connections().items()}
    neurons = {name: value.detach().clone() for name, value in net.named_parameters() if name.startswith("lif")}
    return {**weights, **neurons}


def test_the_average_is_what_is_tested_analysed_and_saved(tmp_path):
    files = run(tmp_path, average=100, epochs=2)
    state, trainer, accuracies = load(files), small_trainer(epochs=2), {}
    for part in ("model", "trained"):
        trainer.net.load_state_dict(state[part])
        accuracies[part] = trainer.evaluate().accuracy
    assert accuracies["model"] != accuracies["trained"]
    assert state["history"][-1]["test_acc"] == accuracies["model"]
    assert_equal(dict(read_run(files.checkpoint).network().state_dict()), dict(state["model"]))


def test_standardized_inputs_have_mean_zero_and_deviation_one():
    data = load_dataset(SMALL["dataset"])
    trainer = small_trainer(data, standardize=True)
    samples = as_samples(data.train_images[: SMALL["limit_train"]])
    encoded, exact = trainer.net.encode(samples), samples.double()
    expected = 3 * (exact - exact.mean()) / exact.std(correction=0)
    torch.testing.assert_close(encoded.double(), expected, rtol=1e-5, atol=1e-5)  # of values in float32
    # the network brings them along: who analyses it needs no training images
    net = build_network(trainer.settings, data.input_dim, data.num_classes)
    net.load_state_dict(trainer.net.state_dict())
    assert torch.equal(net.encode(samples), encoded)
    alike = dataclasses.replace(data, train_images=torch.full_like(data.train_images, 7))
    with pytest.raises(DataError, match="all values of the 200 training images of fashionmnist-mini are 7"):
        small_trainer(alike, standardize=True)


def test_the_share_of_neurons_that_never_fire_is_that_over_all_images_of_the_epoch(monkeypatch):
    trainer = small_trainer()
    trainer.net.fc1.bias.data[:16] = -1e6
    fired, simulate = [torch.zeros(64), torch.zeros(64), torch.zeros(10)], trainer.net.simulate

    def seen(inputs, **options):
        activity = simulate(inputs, **options)
        for total, spikes in zip(fired, activity.spikes, strict=True):
            total += spikes.dense().sum((0, 1))
        return activity

    monkeypatch.setattr(trainer.net, "simulate", seen)
    monkeypatch.setattr(trainer, "evaluate", lambda part: trainer_module.Evaluation(0.0, {}, {}))
    silent = trainer.train_epoch()["silent"]
    assert silent["lif1"] >= 16 / 64
    assert list(silent.values()) == [(total == 0).float().mean().item() for total in fired]


def test_an_epoch_is_printed_and_recorded(tmp_path, capsys):
    files = run(tmp_path, sparsity_mode="dynamic", dst_interval=3)
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in files.history.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for line, record in zip(lines, records, strict=True):
        measures = [f"{name}={record[name]:.4f}" for name in ("train_acc", "test_acc", "train_loss")]
        assert line == " | ".join([f"Epoch {record['epoch']:02d}", *measures, f"{record['seconds']:.1f} s"])
    last = records[-1]
    names = "epoch train_loss train_acc test_acc seconds cpu_seconds samples_per_s firing_rate silent accumulates"
    names += " multiplies density units units_pruned units_grown units_kept initial_units_kept"
    assert set(last) == set(names.split())
    assert all(
        0 < last["firing_rate"][name] <= 1 and 0 <= last["silent"][name] < 1 for name in ("lif1", "lif2", "lif3")
    )
    # fc1 multiplies a held current once per image and weight; the layers behind it add, for each spike, what it reaches
    assert last["accumulates"]["fc1"] == last["multiplies"]["fc2"] == last["multiplies"]["fc3"] == 0
    analysis = json.loads(files.analysis.read_text())["layers"]
    for number, kind in ((1, "multiplies"), (2, "accumulates"), (3, "accumulates")):
        assert last[kind][f"fc{number}"] == pytest.approx(analysis[f"lif{number}"][kind])
    # 12 steps, an update after every third
    assert last["units_pruned"] == last["units_grown"] == 4 * sum(int(0.1 * n) for n in last["units"].values())
    saved = load(files)["model"]
    assert (
        last["units"] == records[0]["units"] == {name: len(saved[f"{name}.values"]) for name in ("fc1", "fc2", "fc3")}
    )
    assert last["train_loss"] < records[0]["train_loss"]


def test_other_settings_than_the_files_are_refused_by_name_and_what_was_not_written_at_the_end_is_made_up_for(tmp_path):
    files = run(tmp_path)
    content, state, analysis = files.checkpoint.read_bytes(), load(files), files.analysis.read_text()
    for finished in (True, False):
        if not finished:  # it was killed between checkpoint and marker
            files.marker.unlink()
            files.analysis.unlink()
            files.history.write_text("")
        with pytest.raises(CheckpointError) as error:
            run(tmp_path, lr=0.01, dropout=0.1)
        for part in ("lr: 0.001 there, 0.01 now", "dropout: 0.0 there, 0.1 now", "`checkpoint_dir`"):
            assert part in str(error.value)
        assert "epochs" not in str(error.value)
        assert files.checkpoint.read_bytes() == content
    run(tmp_path)
    assert files.marker.exists()
    assert files.analysis.read_text() == analysis
    assert_equal(load(files), state)
    assert len(files.history.read_text().splitlines()) == 3
    files.marker.unlink()
    write_tensors(files.checkpoint, {**state, "settings": {**state["settings"], "colour": "red"}})
    with pytest.raises(CheckpointError, match="colour: red there, not set now"):  # a setting of a later version
        run(tmp_path)


def test_settings_without_effect_may_differ_from_those_of_a_checkpoint(tmp_path):
    """As after a release that changes their default. Where they have an effect, they may not."""
    files = run(tmp_path, epochs=1)
    state, marker = load(files), json.loads(files.marker.read_text())
    for saved in (state, marker):
        saved["settings"] |= {"rec_gain": 1.0, "dst_stop": 0.5, "warmup_epochs": 3}
        del saved["settings"]["reset"]  # and it was saved before there was this one
    write_tensors(files.checkpoint, state)
    files.marker.write_text(json.dumps(marker))
    assert read_run(files.checkpoint).settings == TrainSettings(**{**SMALL, "epochs": 1, "warmup_epochs": 3})
    run(tmp_path, epochs=1)
    files.marker.unlink()
    assert_equal(load(run(tmp_path, epochs=1, cp="random"))["model"], state["model"])
    files.marker.unlink()
    for options, message in (
        ({"reset": "zero"}, "reset: subtract there, zero now"),
        ({"recurrent": True}, r"rec_gain: 1\.0 there, 0\.2 now\n  recurrent: False there, True now\nGive"),
        ({"recurrent": True, "rec_gain": 0.5}, r"rec_gain: 1\.0 there, 0\.5 now"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, epochs=1, **options)


def test_few_parameters_are_updated_by_one_thread_to_the_same_bits(monkeypatch):
    states = []
    with pytorch_threads(2):
        for limit, threads in ((trainer_module.ONE_THREAD_UPDATE, 1), (0, 2)):
            monkeypatch.setattr(trainer_module, "ONE_THREAD_UPDATE", limit)
            trainer, used = small_trainer(), set()
            trainer.optimizer.register_step_pre_hook(lambda *_, used=used: used.add(torch.get_num_threads()))
            trainer.train_epoch()
            assert used == {threads}
            assert torch.get_num_threads() == 2
            states.append(trainer.net.state_dict())
    assert_equal(*states)


def test_training_takes_denormal_numbers_for_zero_and_leaves_the_mode_as_it_was(tmp_path, monkeypatch):
    """Adam's moments of weights without a gradient become such numbers, on which many CPUs are slow."""

    def flushed():
        return bool(torch.tensor(2e-38) * torch.tensor(0.5) == 0)

    evaluate, during = Trainer.evaluate, []
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: during.append(flushed()) or evaluate(*args))
    for before in (False, True):
        if not torch.set_flush_denormal(before):
            pytest.skip("this CPU has no such mode")
        try:
            run(tmp_path / str(before), epochs=1)
            assert flushed() == before
        finally:
            torch.set_flush_denormal(False)
    assert set(during) == {True}


def test_more_epochs_continue_a_finished_run_as_if_it_had_been_as_long_from_the_start(tmp_path):
    dynamic = VARIANTS["dynamic"]
    run(tmp_path / "grown", **dynamic, epochs=2)
    files = run(tmp_path / "grown", **dynamic, epochs=3)
    state = load(files)
    assert_equal(state, load(run(tmp_path / "whole", **dynamic, epochs=3)))
    assert json.loads(files.marker.read_text())["settings"]["epochs"] == 3
    with pytest.raises(CheckpointError, match="epochs: 3 there, 2 now"):
        run(tmp_path / "grown", **dynamic, epochs=2)
    assert files.analysis.exists()
    files.save_checkpoint({name: value for name, value in state.items() if name != "format"})
    # what was of the end is gone when a run goes on
    assert not files.marker.exists()
    assert not files.analysis.exists()


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"lr_schedule": "cosine"}, "lr_schedule=cosine"),
        ({"enforce_sparsity": True, "warmup_epochs": 0}, "enforce_sparsity"),
        ({"sparsity_mode": "dynamic", "dst_stop": 0.5, "dst_interval": 1}, "dst_stop=0.5"),
    ],
)
def test_a_run_that_depends_on_the_number_of_its_epochs_is_not_continued(tmp_path, options, tied):
    run(tmp_path, **options, epochs=1)
    message = f"with `{tied}` each of its 1 epochs depended on their number(.|\n)*`name=NAME`"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, **options, epochs=2)


def test_a_name_makes_room_for_a_run_that_differs_in_what_is_not_named(tmp_path):
    stem = run(tmp_path, epochs=1).checkpoint.stem
    with pytest.raises(CheckpointError, match="`name=NAME` to train another run in this directory"):
        run(tmp_path, epochs=1, lr=0.01)
    second = run(tmp_path, epochs=1, lr=0.01, name="lr0.01")
    assert second.checkpoint.stem == f"{stem}_lr0.01"
    assert run(tmp_path, epochs=1, seed=1, lr=0.01).checkpoint.stem == f"{stem}_s1"  # seeds need no name
    assert_equal(load(second)["model"], load(run(tmp_path / "alone", epochs=1, lr=0.01))["model"])
    for name in ("", "a/b", "..\\a", "a b", "x" * 65, "x.previous", "x.pth", "x."):
        with pytest.raises(SettingsError, match="is no part of a file's name"):
            TrainSettings(name=name)


#: operations whose result the CPU has to know before it can go on, or whose result's shape depends on numbers
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave.Tensor", "bincount", "_assert_async",
}  # fmt: skip


class NeverWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        indices = args[1] if name.startswith(("index.", "index_put")) else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if by_mask or name in WAITING or name.split(".")[0] in WAITING:
            raise AssertionError(f"{name} would wait for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["rate, bf16", "permuted pixels, chunks", "regularised", "all schedules"])
def test_no_step_and_no_update_of_the_masks_waits_for_the_device(variant):
    settings = TrainSettings(**{**SMALL, **VARIANTS[variant]})
    trainer = Trainer(settings, load_dataset(settings.dataset), Machine(torch.device("cpu"), "torch"))
    trainer.epoch = settings.epochs
    for wait in (torch.Tensor.item, lambda one: one[one > 0]):
        with NeverWaiting(), pytest.raises(AssertionError, match="would wait for the device"):
            wait(torch.ones(1))
    for images in torch.arange(128).split(64):
        with NeverWaiting():
            trainer._train_step(images)
    assert trainer.step == 2
    assert trainer.dst is None or trainer.dst.grown > 0
