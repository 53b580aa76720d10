"""Averages of networks that are rewired, by those who take averages: Lightning, timm, torch-ema, PyTorch."""

import copy
import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset
from torch_ema import ExponentialMovingAverage

from g2gnet import DSTScheduler, G2GNet, tie_wiring
from g2gnet.data import load_dataset

DECAY, STEPS = 0.9, 80
MIXED = r"average of networks with different wirings.*averages=\[average\]"


def network():
    return G2GNet(784, 128, 10, block_size=10, T=8, enc_scale=3.0, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data():
    mini = load_dataset("fashionmnist-mini")
    parts = (mini.train_images, mini.train_labels), (mini.test_images, mini.test_labels)
    return [(images.flatten(1).float() / images.max(), labels) for images, labels in parts]


@torch.no_grad()
def accuracy(model, test):
    return 100 * (model(test[0]).argmax(1) == test[1]).float().mean().item()


def dense_weights(model):
    return [layer.dense_weight().detach().double() for layer, _ in model.layers()]


def same_wiring(one, other):
    pairs = zip(one.layers(), other.layers(), strict=True)
    return all(mine.mask.equals(theirs.mask) for (mine, _), (theirs, _) in pairs)


def train(net, data, after_step, averages=()):
    (images, labels), _ = data
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    dst = DSTScheduler(net, optimizer, interval=20, fraction=0.2, grow="random", averages=averages)
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS - 5):  # the last update is a while ago, as at the end of most training
        batch = torch.randint(len(images), (64,), generator=draw)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
        after_step()
        dst.step()
    assert dst.pruned > 0


#: PyTorch's are in test_averages.py
AVERAGES = {
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "one by one, without buffers": functools.partial(ModelEmaV3, foreach=False, exclude_buffers=True),
}


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_average_is_rewired_with_the_network(make, data):
    """Each connection has its average weight, where the steps before it grew count as zero."""
    net = network()
    average, expected = make(net, decay=DECAY), dense_weights(net)

    def after_step():
        average.update(net)
        for (layer, _), mean, weight in zip(net.layers(), expected, dense_weights(net), strict=True):
            mean.mul_(layer.mask.to_dense()).lerp_(weight, 1 - DECAY)  # what was pruned is forgotten

    train(net, data, after_step, [average])
    assert same_wiring(average.module, net)
    for mean, weight in zip(expected, dense_weights(average.module), strict=True):
        torch.testing.assert_close(weight, mean, rtol=1e-5, atol=1e-6)
    again = network()
    again.load_state_dict(copy.deepcopy(average.module.state_dict()))
    assert accuracy(again, data[1]) == accuracy(average.module, data[1])


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_average_that_nobody_tied_is_reported_and_refused_once_wirings_mix(make, data, caplog):
    net = network()
    average = make(net, decay=DECAY)
    if make is AVERAGES["one by one, without buffers"]:  # timm then copies buffers: the weights alone are averaged
        train(net, data, lambda: average.update(net))
        average.update(net)
        assert same_wiring(average.module, net)
    else:
        with pytest.raises(ValueError, match=MIXED):
            train(net, data, lambda: average.update(net))
    assert caplog.text.count("averages=[average]") == 1


def test_a_list_of_averages_has_the_wiring_of_whom_it_is_copied_to(data):
    net = network()
    average = ExponentialMovingAverage(net.parameters(), decay=DECAY)
    train(net, data, average.update)
    plain, state = accuracy(net, data[1]), average.state_dict()
    with average.average_parameters():
        assert accuracy(net, data[1]) > plain - 10
    assert accuracy(net, data[1]) == plain
    again = network()
    again.load_state_dict(net.state_dict())
    other = ExponentialMovingAverage(again.parameters(), decay=DECAY)
    other.load_state_dict(state)
    other.copy_to(again.parameters())
    with average.average_parameters():
        assert accuracy(again, data[1]) == accuracy(net, data[1])


class Module(L.LightningModule):
    def __init__(self, tied=True):
        super().__init__()
        self.net, self.tied = network(), tied

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        self.dst = DSTScheduler(self.net, optimizer, interval=20, fraction=0.2, grow="random")
        return optimizer

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_fit_start(self):
        if self.tied:
            tie_wiring(self.net, self.trainer.callbacks[0]._average_model.module.net)

    def on_train_batch_end(self, *_):
        self.dst.step()

    def validation_step(self, batch, _):
        self.log("accuracy", 100 * (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize("tied", [True, False])
def test_lightnings_average_is_validated_and_saved_if_it_is_tied(tied, data, caplog):
    train_data, test_data = (TensorDataset(images, labels) for images, labels in data)
    module, callback = Module(tied), EMAWeightAveraging(decay=DECAY)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(max_steps=STEPS, accelerator="cpu", devices=1, callbacks=[callback], **silent)
    batches = DataLoader(train_data, 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, batches, DataLoader(test_data, len(test_data)))
    assert module.dst.pruned > 0
    assert caplog.text.count("averages=[average]") == (not tied)
    if not tied:
        with pytest.raises(ValueError, match=MIXED):
            trainer.save_checkpoint("last.ckpt")
        return
    trainer.save_checkpoint("last.ckpt")
    again = Module()
    again.load_state_dict(torch.load("last.ckpt", weights_only=False)["state_dict"])
    reached = accuracy(again.net, data[1])
    assert reached > 50
    # at the end of the fit the module is the average
    assert same_wiring(again.net, module.net)
    assert accuracy(module.net, data[1]) == reached
