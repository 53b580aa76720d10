"""``g2g-pretrain``: what it computes and writes, and how it goes on."""

import math

import pytest
import torch
from small_data import write_cifar
from torch.nn import functional as F
from training_runs import assert_equal

import train
from g2gnet.base.seeding import make_deterministic, stream
from g2gnet.data import load_dataset, random_crop_and_flip
from g2gnet.data.features import load_resnet, new_resnet
from g2gnet.programs import pretrain
from g2gnet.programs.pretrain import PretrainSettings, PretrainTrainer


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the program on 30 images in two batches; returns its exit status."""
    write_cifar(monkeypatch, tmp_path / "data", "cifar10", train=30, test=10)

    def run(directory, *flags):
        common = ["--data_dir", tmp_path / "data", "--checkpoint_dir", tmp_path / directory, "--batch_size", 16]
        return pretrain.main([str(flag) for flag in (*common, "--epochs", 3, *flags)])

    return run


@pytest.mark.ci
def test_an_interrupted_run_ends_with_the_same_weights_and_train_py_takes_them(run, tmp_path, monkeypatch, capsys):
    assert run("whole") == 0
    output = capsys.readouterr().out

    def stop_in_epoch_three(self, on_step=None, train_epoch=PretrainTrainer.train_epoch):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train_epoch", stop_in_epoch_three)
        assert run("parts") == 130
    assert run("parts") == 0
    assert "resuming" in capsys.readouterr().out
    whole, parts = (tmp_path / name / "resnet32_cifar10.pth" for name in ("whole", "parts"))
    assert_equal(*(torch.load(path, weights_only=True) for path in (whole, parts)))
    # the weights files are equal byte by byte: a run that uses one may go on with the other
    assert whole.with_suffix(".pt").read_bytes() == parts.with_suffix(".pt").read_bytes()
    assert "Epoch 03 | train_acc=" in output
    (command,) = [line for line in output.splitlines() if line.startswith("wrote ")]
    flags = command.partition("train.py ")[2].split()
    small = ["--hidden_dim", "16", "--T", "2", "--epochs", "1", "--data_dir", str(tmp_path / "data")]
    assert train.main([*flags, *small, "--checkpoint_dir", str(tmp_path / "run")]) == 0


def test_an_epoch_is_sgd_with_cosine_decay_on_augmented_images(tmp_path, monkeypatch):
    write_cifar(monkeypatch, tmp_path, "cifar10", train=30, test=10)
    settings = PretrainSettings(epochs=3, batch_size=16, lr=0.002, seed=7)
    data = load_dataset("cifar10", tmp_path)
    make_deterministic(settings.seed)
    trainer = PretrainTrainer(settings, data, torch.device("cpu"))
    record = trainer.train_epoch()

    make_deterministic(settings.seed)
    network = new_resnet("cifar10")
    velocities = [torch.zeros_like(parameter) for parameter in network.parameters()]
    order = torch.randperm(30, generator=stream(7, "order", 1))
    losses, correct = [], 0
    for step, index in enumerate((order[:16], order[16:])):
        images = random_crop_and_flip(data.train_images[index], stream(7, "augment", step))
        logits = network(images)
        loss = F.cross_entropy(logits, data.train_labels[index])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        rate = 0.002 * (1 + math.cos(math.pi * step / 6)) / 2
        with torch.no_grad():
            for parameter, velocity, gradient in zip(network.parameters(), velocities, gradients, strict=True):
                gradient = gradient + 5e-4 * parameter
                velocity.mul_(0.9).add_(gradient)
                parameter -= rate * (gradient + 0.9 * velocity)
        losses.append(loss.item() * len(index))
        correct += (logits.argmax(1) == data.train_labels[index]).sum().item()
    for (name, parameter), trained in zip(network.named_parameters(), trainer.net.parameters(), strict=True):
        # updates are about 1e-3; SGD adds in another order than the loop above, which Windows' convolutions amplify
        torch.testing.assert_close(trained, parameter, rtol=0, atol=2e-5, msg=name)
    assert record["train_loss"] == pytest.approx(sum(losses) / 30, rel=1e-5)
    assert record["train_acc"] == correct / 30
    with torch.no_grad():
        predicted = trainer.net.eval()(data.test_images).argmax(1)
    assert record["test_acc"] == (predicted == data.test_labels).double().mean().item()


def test_the_weights_are_those_of_the_best_epoch_on_held_out_images(run, tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.4, 0.3])
    monkeypatch.setattr(PretrainTrainer, "_measures", lambda self, progress: ({"val_acc": next(accuracies)}, {}))
    assert run("run", "--validation", 0.2, "--seed", 1) == 0
    stem = tmp_path / "run" / "resnet32_cifar10_s1"
    last, best, weights = (torch.load(f"{stem}{end}", weights_only=True) for end in (".pth", ".best.pth", ".pt"))
    assert best["epoch"] == last["tested"]["best"]["epoch"] == 2
    assert_equal(weights, best["model"])
    data, net = load_dataset("cifar10", tmp_path / "data"), load_resnet("cifar10", f"{stem}.pt").eval()
    with torch.no_grad():
        found = (net(data.test_images).argmax(1) == data.test_labels).double().mean().item()
    assert last["tested"]["best"]["test_acc"] == found
