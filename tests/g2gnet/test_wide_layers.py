"""Networks of wide layers: no tensor of as many elements as dense weights is formed, whatever is done with them."""

import copy

import pytest
import torch
from helpers import Largest, saved_and_read

from g2g_kernels import GroupLayout, available_backends
from g2gnet import G2GNet
from g2gnet.data import load_dataset
from g2gnet.dst import scores
from g2gnet.inspect import SpikeSums, coherence, count_correlation, temporal_synchrony
from g2gnet.training import Machine, TrainSettings, run_training

H, GROUPS = 512, 64
WIDE = {"model": "index", "hidden_dim": H, "num_groups": GROUPS, "p_inter": 1 / GROUPS, "block_size": 8, "T": 4}

# the reference unpacks its weights
pytestmark = pytest.mark.skipif(available_backends() == ["torch"], reason="needs compiled kernels")


@pytest.mark.parametrize(("prune", "grow"), [("set", "gradient"), ("hebb", "hebb")])
def test_training_rewiring_analysis_and_resuming_form_no_dense_weights(prune, grow, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "BAND", 1)  # one block row of the gradient at a time
    data = load_dataset("fashionmnist-mini").limited(64, 32)
    rewiring = {"sparsity_mode": "dynamic", "dst_interval": 1, "cp": prune, "cg": grow}
    small = {"dataset": "fashionmnist-mini", "limit_train": 64, "limit_test": 32, "batch_size": 32, "epochs": 2}
    settings = TrainSettings(**WIDE, **rewiring, **small, surrogate="triangle", standardize=True)
    machine = Machine(torch.device("cpu"))

    def stop(*_):
        raise KeyboardInterrupt

    with Largest() as largest:
        with pytest.raises(KeyboardInterrupt):
            run_training(settings, lambda: data, tmp_path, machine, on_epoch=[stop])
        assert run_training(settings, lambda: data, tmp_path, machine)["units_grown"] > 0
    assert list(tmp_path.glob("*.analysis.json"))
    assert largest.numel < H * H


def test_what_shows_and_keeps_a_network_forms_no_dense_weights():
    net = G2GNet(64, num_classes=10, **WIDE)
    with Largest() as largest:
        copy.deepcopy(net).load_state_dict(saved_and_read(net.state_dict()))
        for mask in (net.fc1.mask, net.fc2.mask):
            assert len(mask.to_string().splitlines()) == 64
            assert mask._repr_html_()
        net.fc2.mask.edges(net.fc2.values)
    assert largest.numel < H * H


@pytest.mark.parametrize("kind", ["index", "random"])
def test_activity_is_summed_without_a_matrix_of_neurons_by_groups(kind):
    layout = GroupLayout(H + 1, GROUPS, kind)  # one group is larger than the others
    spikes = (torch.rand(3, 9, H + 1) < 0.3).float()
    with Largest() as largest:
        sums = SpikeSums.of(spikes, torch.arange(9) % 3, 3, layout)
        count_correlation(sums), temporal_synchrony(sums), coherence(sums, sums)
    assert largest.numel < H * GROUPS
    assert torch.equal(sums.activity[..., 0], spikes[..., layout.group_of == 0].sum(-1).double())
