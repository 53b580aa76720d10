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
    net = g2gnet.load(checkpoint)
    assert not net.training
    data = load_dataset("fashionmnist-mini")
    with torch.no_grad():
        found = net(as_samples(data.test_images[:100])).argmax(1)
    accuracy = (found == data.test_labels[:100]).double().mean().item()
    assert accuracy == pytest.approx(read_run(checkpoint).history[-1]["test_acc"])


def test_a_device_or_backend_that_is_not_there_is_refused_before_the_file_is_read(tmp_path):
    with pytest.raises(ValueError, match="device='gpu' is unknown; give auto, cpu"):
        g2gnet.load(tmp_path / "nowhere.pth", device="gpu")
    with pytest.raises(ValueError, match="backend='fast' is not a backend; choose one of auto"):
        g2gnet.load(tmp_path / "nowhere.pth", backend="fast")
    with pytest.raises(CheckpointError, match=r"nowhere.pth cannot be read \(No such file or directory\)"):
        g2gnet.load(tmp_path / "nowhere.pth")


def test_defaults_of_pytorch_do_not_change_what_is_loaded(checkpoint):
    plain = g2gnet.load(checkpoint)
    with torch.device("meta"):
        on_meta = g2gnet.load(checkpoint)
    torch.set_default_dtype(torch.float64)
    try:
        in_float64 = g2gnet.load(checkpoint)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for net in (on_meta, in_float64):
        assert_equal(dict(net.state_dict()), dict(plain.state_dict()))


def test_inputs_are_not_divided_by_what_is_no_deviation(checkpoint, tmp_path):
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
