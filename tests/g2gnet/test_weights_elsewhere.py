"""Weights that stand in place of a layer's own, or that something else computes: the wiring comes with them."""

import copy
import functools
import io

import pytest
import torch
from helpers import seeded
from networks import small_net
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune

from g2gnet import DSTScheduler

X = torch.rand(6, 32, generator=seeded(9))
HIDDEN = torch.rand(5, 40, generator=seeded(8))


network = functools.partial(small_net, sizes=(32, 40, 10), p_inter=1 / 7, block_size=3, T=4, enc_scale=3.0)


def parameters(net):
    return dict(net.named_parameters())


def parameters_and_buffers(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@pytest.mark.parametrize("given", [parameters, parameters_and_buffers])
@pytest.mark.parametrize("base", ["another network", "a copy on meta"])
def test_a_functional_call_with_a_networks_weights_is_that_network(base, given):
    net = network()
    host = network(seed=1) if base == "another network" else copy.deepcopy(network(seed=1)).to("meta")
    assert torch.equal(functional_call(host, given(net), (X,)), net(X))
    if base == "another network":  # of which nothing stays
        assert torch.equal(host(X), network(seed=1)(X))
        assert torch.equal(host.fc2.mask.to_dense(), network(seed=1).fc2.mask.to_dense())


def test_a_functional_call_follows_the_network_whose_weights_it_is_given():
    net, host = network(), network(seed=1)
    for _ in range(2):
        assert torch.equal(functional_call(host, parameters_and_buffers(net), (X,)), net(X))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        dst = DSTScheduler(net, optimizer, interval=1, fraction=0.3, grow="random")
        net(X).sum().backward()
        optimizer.step()
        dst.step()
    assert torch.equal(functional_call(host, parameters(net), (X,)), net(X))


@pytest.mark.parametrize("steps", [4, 6])
def test_a_functional_call_with_a_networks_state_is_that_network(steps):
    """Of another wiring and another number of steps, too, of which nothing stays."""
    net, host = network(p_inter=0.15, T=steps), network(seed=1)
    for each in (net, host):
        assert torch.equal(functional_call(each, net.state_dict(), (X,)), net(X))
    assert host.T == 4
    assert torch.equal(host(X), network(seed=1)(X))


def soft(target, source):
    target.data.lerp_(source.data, 0.1)


def hard(target, source):
    target.data.copy_(source.data)


@pytest.mark.parametrize("update", [soft, hard])
@pytest.mark.parametrize("every", [1, 3])
def test_target_networks_that_are_tensors_are_rewired_with_their_network(update, every):
    """As torchrl's: clones of parameters and buffers, of which only the parameters are updated."""
    net = network()
    target = {name: tensor.detach().clone() for name, tensor in parameters_and_buffers(net).items()}
    twin = {name: layer.dense_weight().detach() for name, layer in net.named_children() if name.startswith("fc")}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    dst = DSTScheduler(net, optimizer, interval=2, fraction=0.3, prune="random", grow="random")
    for step in range(8):
        counts = functional_call(net, target, (X,))
        host = network(seed=1)
        expected = {**target, **{f"{name}.values": net.get_submodule(name).mask.pack(twin[name]) for name in twin}}
        expected |= {name: buffer for name, buffer in net.named_buffers() if name.endswith("wiring")}
        assert torch.equal(counts, functional_call(host, expected, (X,))), step
        optimizer.zero_grad()
        (net(X) - counts - 1).square().sum().backward()
        optimizer.step()
        if step % every == 0:
            for name, parameter in net.named_parameters():
                update(target[name], parameter)
            for name, weight in twin.items():
                update(weight, net.get_submodule(name).dense_weight())
        dst.step()
        for name, weight in twin.items():
            twin[name] = weight * net.get_submodule(name).mask.to_dense()
    assert dst.pruned > 0
    assert len(net.fc2.lineage._guests) == 1
    del target, expected
    net(X)
    functional_call(net, net.state_dict(), (X,))
    assert len(net.fc2.lineage._guests) <= 1


def test_other_tensors_in_place_of_weights_keep_their_own_wiring():
    """A snapshot that nobody writes to, and the tensors of another network."""
    net, other = network(), network(seed=1)
    snapshot = {name: tensor.detach().clone() for name, tensor in parameters_and_buffers(net).items()}
    theirs = {name: tensor.detach().clone() for name, tensor in parameters_and_buffers(other).items()}
    expected = [functional_call(net, each, (X,)) for each in (snapshot, theirs)]
    dst = DSTScheduler(net, torch.optim.SGD(net.parameters(), lr=0.1), interval=1, fraction=0.3, grow="random")
    dst.step()
    theirs["fc2.values"].mul_(2)
    with torch.no_grad():
        other.fc2.values.mul_(2)
    assert torch.equal(functional_call(net, snapshot, (X,)), expected[0])
    assert torch.equal(functional_call(net, theirs, (X,)), other(X))


def test_an_average_of_two_wirings_in_place_of_the_wiring_is_refused():
    net, other = network(), network()
    mask = other.fc2.mask
    row, col = (~mask.present()).nonzero()[0]
    mask.relabel_(torch.tensor([0]), row[None], col[None])
    mixed = {
        name: (mine + theirs) / 2
        for (name, mine), theirs in zip(
            parameters_and_buffers(net).items(), parameters_and_buffers(other).values(), strict=True
        )
    }
    with pytest.raises(ValueError, match="average of networks with different wirings"):
        functional_call(net, mixed, (X,))


def test_networks_of_one_wiring_run_in_one_vmap_and_others_are_refused():
    layers = [copy.deepcopy(network().fc2) for _ in range(3)]
    for number, layer in enumerate(layers):
        layer.values.data.mul_(1 + number)
    base = copy.deepcopy(layers[0]).to("meta")

    def call(weights, buffers):
        return functional_call(base, (weights, buffers), (HIDDEN,))

    together = vmap(call)(*stack_module_state(layers))
    for result, layer in zip(together, layers, strict=True):
        torch.testing.assert_close(result, layer(HIDDEN))
    mask = layers[1].mask
    mask.relabel_(torch.arange(2), mask.unit_row[[1, 0]].clone(), mask.unit_col[[1, 0]].clone())
    with pytest.raises(ValueError, match="different wirings"):
        vmap(call)(*stack_module_state(layers))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assigned_weights_come_with_their_wiring_and_device(device):
    net = network()
    other = network(seed=1).to(device)
    other.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(other(X), net(X))
    assert torch.equal(other.fc2.mask.to_dense(), net.fc2.mask.to_dense())


def test_numbers_that_are_not_there_are_not_loaded():
    net = network()
    with pytest.raises(RuntimeError, match=r"fc1\.values is on the device meta"):
        net.load_state_dict(network(seed=1).to("meta").state_dict())
    assert torch.equal(net.fc2.mask.to_dense(), network().fc2.mask.to_dense())


def test_a_state_of_a_version_that_described_masks_otherwise_is_refused_by_name():
    net = network()
    state = network(seed=1).state_dict()
    state["fc2.mask.unit_row"] = state.pop("fc2.mask.wiring")
    with pytest.raises(
        RuntimeError, match=r"fc2\.mask\.unit_row was saved by a version that .* Train the network again"
    ):
        net.load_state_dict(state, strict=False)
    assert torch.equal(net.fc2.dense_weight(), network().fc2.dense_weight())


class Half(nn.Module):
    def forward(self, values):
        return values / 2


WRAPPED = {
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "values", Half()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "values"),
    "pruning": lambda layer: prune.l1_unstructured(layer, "values", amount=0.5),
    "the old weight_norm": lambda layer: nn.utils.weight_norm(layer, "values"),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_something_computes_are_saved_and_loaded_with_the_same_wiring_only(wrap):
    layers = [network().fc2, network().fc2, network(seed=1).fc2]
    with torch.no_grad():
        layers[1].values.mul_(3)
    for layer in layers:
        wrap(layer)
    first, second, other = layers
    x = HIDDEN.clone().requires_grad_()
    first(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert any(parameter.grad.abs().sum() > 0 for name, parameter in first.named_parameters() if name != "bias")
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    assert torch.equal(second(HIDDEN), first(HIDDEN))
    with pytest.raises(RuntimeError, match="mask differs"):
        other.load_state_dict(first.state_dict())
    assert torch.equal(other.mask.to_dense(), network(seed=1).fc2.mask.to_dense())


def test_parametrized_weights_are_what_the_parametrization_says():
    layer = network().fc2
    weight = layer.dense_weight().detach()
    parametrize.register_parametrization(layer, "values", Half())
    assert torch.equal(layer.dense_weight(), weight / 2)
    assert torch.equal(copy.deepcopy(layer)(HIDDEN), layer(HIDDEN))
    parametrize.remove_parametrizations(layer, "values")
    assert torch.equal(layer.dense_weight(), weight / 2)
    assert isinstance(layer.values, nn.Parameter)


def test_the_state_for_distributed_checkpoints_is_the_networks():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    net, other = network(), network(seed=1)
    state = get_model_state_dict(net)
    assert state.keys() == net.state_dict().keys()
    set_model_state_dict(other, state)
    assert torch.equal(other(X), net(X))


def test_parameters_can_be_swapped_when_dtype_or_device_change():
    net = network()
    expected = net.fc2.dense_weight().detach().double()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double()
        assert torch.equal(net.fc2.dense_weight(), expected)
        net.load_state_dict(network(seed=1).double().state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(net.fc2.dense_weight(), network(seed=1).double().fc2.dense_weight())
