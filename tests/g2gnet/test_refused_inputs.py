"""What a network or a run does not take is named, with the reason and a remedy, before any work is done."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import run

from g2gnet import LIF, G2GNet, SpikingStack
from g2gnet.data import DataError, as_samples, dataset_name, load_dataset


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.uint8, {}), (torch.int64, {"standardize": True}), (torch.bool, {"enc": "rate"})]
)
def test_samples_that_are_not_floats_are_refused_with_what_makes_them_so(options, dtype):
    net = G2GNet(784, 32, 10, T=3, block_size=8, **options)
    images = load_dataset("fashionmnist-mini").test_images[:2]
    with pytest.raises(TypeError, match=rf"samples are {dtype}, not floats; g2gnet.data.as_samples"):
        net(images.reshape(2, -1).to(dtype))
    assert net(as_samples(images)).shape == (2, 10)


def test_inputs_that_are_no_tensors_are_refused():
    net = G2GNet(784, 32, 10, T=3, block_size=8)
    for x, call in ((None, net), ([[0.5] * 784], net.encode), (np.zeros((2, 784), np.float32), net.simulate)):
        with pytest.raises(TypeError, match=rf"the input is a {type(x).__name__}, not a tensor"):
            call(x)


def test_what_a_network_cannot_be_made_of_is_named():
    with pytest.raises(ValueError, match="hidden_dim=0 must be a whole number from 1 to"):
        G2GNet(784, [256, 0], 10)
    with pytest.raises(TypeError, match="fc1 is a Conv2d; a network joins G2GLinear layers"):
        SpikingStack([(nn.Conv2d(1, 8, 3), LIF())])


@pytest.mark.parametrize(
    ("name", "value"), [("recurrent", "no"), ("standardize", 1), ("per_neuron", None), ("learn_beta", "no")]
)
def test_a_flag_that_is_neither_true_nor_false_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be True or False"):
        G2GNet(784, 32, 10, block_size=8, **{name: value})


def save(path, images, labels):
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return dataset_name(str(path))


def test_images_in_float64_become_float32(tmp_path):
    images, labels = np.linspace(0, 1, 24).reshape(6, 4), np.arange(6) % 3
    data = load_dataset(save(tmp_path / "own.npz", images, labels))
    assert data.train_images.dtype == torch.float32
    np.testing.assert_array_equal(data.train_images, images.astype(np.float32))
    with pytest.raises(DataError, match=r"float16 \[6, 4\], not uint8, float32 or float64 \[N, ...\]"):
        load_dataset(save(tmp_path / "half.npz", images.astype(np.float16), labels))
    with pytest.raises(DataError, match="not finite everywhere"):
        load_dataset(save(tmp_path / "large.npz", images * 1e300, labels))


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (2.0, True)])
def test_inputs_that_are_no_spike_probabilities_are_told(tmp_path, caplog, scale, warned):
    with caplog.at_level(logging.WARNING, "g2gnet"):
        run(tmp_path, enc="rate", enc_scale=scale, epochs=1, T=2)
    images = as_samples(load_dataset("fashionmnist-mini").train_images[:200])
    share = 100 * (scale * images > 1).double().mean().item()
    assert (f"{share:.3g} % of the inputs are below 0 or above 1 and are clipped" in caplog.text) == warned
