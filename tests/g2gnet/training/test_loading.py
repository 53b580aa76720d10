"""The network of a checkpoint: what ``g2gnet.load`` gives, and where it can go from there."""

import pytest
import torch
from tiny_checkpoints import replaced, rewrite, train_tiny
from training_runs import assert_equal

import g2gnet
from g2gnet.base.tensor_files import read_tensors
from g2gnet.data import as_samples, load_dataset
from g2gnet.training import CheckpointError, read_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("run"), "--model mixer --standardize --neuron synaptic")


def test_a_loaded_network_classifies_as_the_run_did(checkpoint):
    net, data = g2gnet.load(checkpoint), load_dataset("fashionmnist-mini").limited(None, 100)
    assert not net.training
    with torch.no_grad():
        found = net(as_samples(data.test_images)).argmax(1)
    accuracy = (found == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(read_run(checkpoint).history[-1]["test_acc"])
    # whatever the defaults of PyTorch are
    with torch.device("meta"):
        on_meta = g2gnet.load(checkpoint)
    torch.set_default_dtype(torch.float64)
    try:
        in_float64 = g2gnet.load(checkpoint)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (on_meta, in_float64):
        assert_equal(dict(other.state_dict()), dict(net.state_dict()))


def test_what_cannot_be_loaded_is_refused(checkpoint, tmp_path):
    for options, message in (
        ({"device": "gpu"}, "device='gpu' is unknown; give auto, cpu"),  # before the file is read
        ({"backend": "fast"}, "backend='fast' is not a backend; choose one of auto"),
        ({}, r"nowhere.pth cannot be read \(No such file or directory\)"),
    ):
        with pytest.raises(ValueError if options else CheckpointError, match=message):
            g2gnet.load(tmp_path / "nowhere.pth", **options)
    content = replaced(read_tensors(checkpoint), "model/input_deviation", torch.zeros(()))
    with pytest.raises(CheckpointError, match=r"input_deviation is not above 0"):
        g2gnet.load(rewrite(checkpoint, tmp_path / "c.pth", **content))


def test_a_network_that_was_trained_with_reset_to_zero_goes_to_nir_and_back(checkpoint, tmp_path):
    pytest.importorskip("nir")
    from g2gnet.interop import from_nir, to_nir

    with pytest.raises(ValueError, match=r"train the network with reset='zero' \(train.py --reset zero\)"):
        to_nir(g2gnet.load(checkpoint))
    net = g2gnet.load(train_tiny(tmp_path, "--model mixer --reset zero --beta 0.9"))
    back = from_nir(to_nir(net), T=net.T)
    inputs = net.encode(as_samples(load_dataset("fashionmnist-mini").test_images[:20]))
    with torch.no_grad():
        torch.testing.assert_close(back.simulate(inputs).counts, net.simulate(inputs).counts)
