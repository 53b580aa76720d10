"""Networks of wide layers: no tensor of as many elements as dense weights is formed, whatever is done with them."""

import copy

import pytest
import torch
from helpers import Largest, saved_and_read

from g2g_kernels import BlockMask, GroupLayout, available_backends
from g2g_kernels.cpu import library
from g2g_kernels.mask import sampling
from g2gnet import LIF, DSTScheduler, G2GLinear, Projection, SpikingNetwork, inspect, keep_signs
from g2gnet.data import load_dataset
from g2gnet.dst import replacement, rules
from g2gnet.programs.report import content, page
from g2gnet.programs.report import program as report
from g2gnet.training import Machine, TrainSettings, run_training

H, GROUPS = 512, 64
WIDE = {"model": "index", "hidden_dim": H, "num_groups": GROUPS, "p_inter": 1 / GROUPS, "block_size": 8, "T": 4}

# the reference unpacks its weights
pytestmark = pytest.mark.skipif(available_backends() == ["torch"], reason="needs compiled kernels")


@pytest.mark.ci
@pytest.mark.parametrize(("prune", "grow"), [("set", "gradient"), ("hebb", "hebb")])
def test_training_rewiring_analysis_and_resuming_form_no_dense_weights(prune, grow, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "BAND", 1)  # one block row of the gradient at a time
    monkeypatch.setattr(content, "picture", lambda figure, caption: page.paragraph(caption))  # drawn, and not written
    data = load_dataset("fashionmnist-mini").limited(64, 32)
    monkeypatch.setattr(report.flags, "load_run_data", lambda *_: data)  # the images are of more numbers
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
        (checkpoint,) = (path for path in tmp_path.glob("*.pth") if "best" not in path.name)
        target = tmp_path / "report.html"
        assert not report.main([str(checkpoint), "--output", str(target), "--samples", "8", "--device", "cpu"])
    assert target.exists()
    assert list(tmp_path.glob("*.analysis.json"))
    assert largest.numel < H * H


@pytest.mark.skipif("cpu" not in available_backends(), reason="needs the compiled kernels")
@pytest.mark.parametrize(("prune", "grow"), [("set", "random"), ("hebb", "hebb"), ("set", "gradient")])
@pytest.mark.parametrize("size", [1200, pytest.param(22400, marks=pytest.mark.long)])  # of a million weights
def test_a_recurrent_network_of_few_single_weights_forms_nothing_of_their_grid(size, prune, grow, monkeypatch):
    monkeypatch.setattr(library, "LIST_COST", 0.0)
    monkeypatch.setattr(sampling, "LARGEST_GRID", 1 << 16)
    monkeypatch.setattr(replacement, "LARGEST_GRID", 1 << 16)
    monkeypatch.setattr(rules, "BAND", 1 << 12)
    draw = torch.Generator().manual_seed(0)

    def joined(out: int, into: int, density: float, **options) -> G2GLinear:
        mask = BlockMask.sample(GroupLayout(out), GroupLayout(into), density=density, block_size=1, generator=draw)
        return G2GLinear(mask, generator=draw, **options)

    with Largest() as largest:
        projections = [
            Projection("input", "a", joined(size, 16, 0.2)),
            Projection("a", "a", joined(size, size, 0.002, bias=False), delay=1),
            Projection("a", "out", joined(10, size, 0.1)),
        ]
        net = SpikingNetwork({"a": LIF(), "out": LIF()}, projections, "out", T=5)
        optimizer = torch.optim.Adam(net.parameters())
        signs = keep_signs(net, optimizer, {"a": torch.where(torch.arange(size) % 5 == 4, -1, 1)})
        average = torch.optim.swa_utils.AveragedModel(net)
        scheduler = DSTScheduler(net, optimizer, 1, 0.2, prune, grow, averages=[average])
        layer, before = net.a_to_a, net.a_to_a.mask.num_units
        for _ in range(3):
            net(3 * torch.rand(4, 16, generator=draw)).sum().backward()
            optimizer.step()
            units, moments = layer.mask.flat_unit(), optimizer.state[layer.values]["exp_avg"]
            weights, moments_before = layer.values.detach().clone(), moments.clone()
            scheduler.step()
            stay = units == layer.mask.flat_unit()  # in their slots
            assert int((~stay).sum()) == before // 5
            assert len(layer.mask.flat_unit().unique()) == len(moments) == before
            for now, then in ((moments, moments_before), (layer.values, weights)):
                assert torch.equal(now[stay], then[stay])
                assert not now[~stay].any()
            average.update_parameters(net)
        assert scheduler.grown == scheduler.pruned >= 3 * (before // 5)
        weight = layer.mask.edges(layer.values)
        assert (weight.weight * signs.signs["a"].numpy()[weight.source] >= 0).all()
        gradual = {"final_density": 0.001, "total_steps": 2, "averages": [average]}
        pruning = DSTScheduler(net, optimizer, 1, grow="random", **gradual)
        net(3 * torch.rand(4, 16, generator=draw)).sum().backward()
        optimizer.step()
        pruning.step()
        assert net.a_to_a.mask.num_units < before
        copy.deepcopy(net).load_state_dict(saved_and_read(net.state_dict()))
        mask, values = net.a_to_a.mask, net.a_to_a.values
        inspect.group_density(mask), inspect.cross_group_share(mask), inspect.input_group_entropy(mask, values)
        repr(net), mask.to_string(), mask._repr_html_(), mask.to_scipy(values)
        net.simulate(torch.rand(4, 16)).synaptic_operations()
    assert largest.numel < size * size / 20


@pytest.mark.parametrize("kind", ["index", "random"])
def test_activity_is_summed_without_a_matrix_of_neurons_by_groups(kind):
    layout = GroupLayout(H + 1, GROUPS, kind)  # one group is larger than the others
    spikes = (torch.rand(3, 9, H + 1) < 0.3).float()
    with Largest() as largest:
        sums = inspect.SpikeSums.of(spikes, torch.arange(9) % 3, 3, layout)
        inspect.count_correlation(sums), inspect.temporal_synchrony(sums), inspect.coherence(sums, sums)
    assert largest.numel < H * GROUPS
    assert torch.equal(sums.activity[..., 0], spikes[..., layout.group_of == 0].sum(-1).double())
