"""What hangs on the layers of a stack: hooks, forwards of their own, weights that are rewritten before a call."""

import functools

import pytest
import torch
from covering import every_pair
from helpers import backends_of, compiles_whole, seeded
from networks import small_net
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from g2g_kernels.ops.g2g_stack import WAYS
from g2gnet import LIF, G2GLinear, SpikingStack, called_layers, spiking_network

STACK_BACKENDS = backends_of(WAYS)
STEPS = 6
SAMPLES = torch.rand(5, 30, generator=seeded(1)) * 3
net_of = functools.partial(small_net, T=STEPS, threshold=0.5)


def run(net, x=SAMPLES, dropped=None):
    """Spikes of every layer, and the gradients of x and every parameter for a loss on counts and rates."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    activity = net.simulate(x, dropped=dropped)
    (activity.counts.square().sum() + 10 * activity.rates[0].sum()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    return [train.dense().detach() for train in activity.spikes], {"x": x.grad, **gradients}


def assert_alike(one, other):
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.sum() > 0
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        # float32 sums in two orders, through 6 steps and 3 layers
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-3, atol=1e-3)
        assert gradient.any()


@pytest.fixture
def one_call(monkeypatch):
    """Counts the calls of the operator of a whole stack."""
    calls, inner = [], spiking_network.run
    monkeypatch.setattr(
        spiking_network, "run", lambda call, chunk: (call.modules or calls.append(1), inner(call, chunk))[1]
    )
    return calls


def nothing(*args):
    pass


HANGING = {
    "forward hook on a connection": lambda net: net.fc2.register_forward_hook(nothing),
    "forward hook on neurons": lambda net: net.lif1.register_forward_hook(nothing),
    "forward hook with names": lambda net: net.fc3.register_forward_hook(lambda *args: None, with_kwargs=True),
    "hook before forward": lambda net: net.lif3.register_forward_pre_hook(nothing),
    "backward hook": lambda net: net.fc1.register_full_backward_hook(nothing),
    "hook before backward": lambda net: net.lif2.register_full_backward_pre_hook(nothing),
    "a forward put in its place": lambda net: setattr(net.fc1, "forward", net.fc1.forward),
}


@every_pair(what=HANGING, backend=STACK_BACKENDS, held=(False, True))
def test_what_only_observes_a_layer_changes_no_spike_and_no_gradient(what, backend, held, one_call):
    net, x = net_of(backend=backend), SAMPLES if held else torch.rand(STEPS, 5, 30, generator=seeded(2)) * 3
    expected = run(net, x)
    assert len(one_call) == 1
    HANGING[what](net)
    assert_alike(run(net, x), expected)
    assert len(one_call) == 1, "the layers were called"


@pytest.mark.parametrize("held", [True, False])
def test_hooks_see_what_passes_every_layer(held):
    net, seen, order = net_of(), {}, []
    x = SAMPLES if held else SAMPLES.expand(STEPS, 5, 30)
    expected = net.simulate(x)

    def see(name):
        return lambda module, args, output: seen.update({name: (args[0], output)})

    handles = [module.register_forward_hook(see(name)) for name, module in net.named_children()]
    handles.append(register_module_forward_hook(lambda module, args, output: order.append(module)))
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    assert order == [*net.children(), net]
    received = x
    for number, (connection, neurons) in enumerate(net.layers(), 1):
        taken, current = seen.pop(f"fc{number}")
        assert torch.equal(taken, received)
        torch.testing.assert_close(current, nn.functional.linear(received, connection.weight, connection.bias))
        currents, received = seen.pop(f"lif{number}")
        assert torch.equal(currents, current.expand(STEPS, *current.shape[-2:]))
        assert torch.equal(received, expected.spikes[number - 1].dense())
        assert torch.equal(received, neurons(currents))
    net(x)
    assert not seen


def test_backward_hooks_see_the_gradients_of_a_layer():
    net, seen = net_of(), []
    net.lif2.register_full_backward_hook(lambda module, to_input, to_output: seen.append((to_input[0], to_output[0])))
    net(SAMPLES).square().sum().backward()
    ((to_current, to_spikes),) = seen
    assert to_current.shape == to_spikes.shape == (STEPS, 5, 40)
    # ∂L/∂b sums the gradient of the current over steps and samples
    torch.testing.assert_close(to_current.sum((0, 1)), net.fc2.bias.grad, rtol=1e-4, atol=1e-4)
    assert to_current.any()
    assert net(SAMPLES).sum() > 0
    net.lif2.register_forward_hook(lambda module, args, output: torch.zeros_like(output))  # what it returns goes on
    net.fc3.bias.data.zero_()
    assert net(SAMPLES).sum() == 0


class Noisy(LIF):
    """A subclass as users write it, without ``steps``."""

    def forward(self, current):
        return super().forward(current + 0.25)


class Twice(G2GLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_forwards_of_subclasses_and_wrappers_are_run():
    net, plain = net_of(), net_of()
    net.lif2, net.fc3.__class__ = Noisy(threshold=0.5), Twice
    net.lif1, net.fc1 = nn.Sequential(net.lif1), nn.Sequential(net.fc1)
    with torch.no_grad():  # the same by other means
        plain.fc2.bias += 0.25
        plain.fc3.bias *= 2
        plain.fc3.values *= 2
    ours, theirs = net.simulate(SAMPLES), plain.simulate(SAMPLES)
    assert all(torch.equal(a.dense(), b.dense()) for a, b in zip(ours.spikes, theirs.spikes, strict=True))
    assert not torch.equal(theirs.counts, net_of()(SAMPLES))
    assert SpikingStack([(plain.fc1, plain.lif1), (plain.fc2, Noisy())], T=STEPS)(SAMPLES).shape == (5, 40)


def test_weights_that_are_rewritten_before_each_call_are_the_ones_used():
    """As the old ``weight_norm`` and ``spectral_norm`` do it; the new ones are parametrizations."""
    net, expected, scale = net_of(), net_of(), nn.Parameter(torch.tensor(1.0))
    weights = net.fc2.bias.detach().clone()
    del net.fc2._parameters["bias"]
    net.fc2.register_forward_pre_hook(lambda module, args: setattr(module, "bias", scale * weights + 0.1))
    for factor in (1.0, 2.0):
        scale.data.fill_(factor)
        expected.fc2.bias.data.copy_(factor * weights + 0.1)
        counts, theirs = net(SAMPLES), expected(SAMPLES)
        assert torch.equal(counts, theirs)
        (gradient,) = torch.autograd.grad(counts.square().sum(), scale)
        (of_bias,) = torch.autograd.grad(theirs.square().sum(), expected.fc2.bias)
        torch.testing.assert_close(gradient, (of_bias * weights).sum(), rtol=1e-3, atol=1e-3)


def test_parametrizations_are_read_by_the_one_call(one_call):
    net, expected, half = net_of(), net_of(), nn.Module()
    half.forward = lambda x: x / 2
    for each, name in (("fc2", "bias"), ("lif1", "threshold")):
        expected.get_submodule(each).get_parameter(name).data /= 2
        parametrize.register_parametrization(net.get_submodule(each), name, half)
    assert torch.equal(net(SAMPLES), expected(SAMPLES))
    assert not torch.equal(net(SAMPLES), net_of()(SAMPLES))
    assert len(one_call) == 4
    net(SAMPLES).square().sum().backward()
    expected(SAMPLES).square().sum().backward()
    torch.testing.assert_close(net.fc2.parametrizations.bias.original.grad, expected.fc2.bias.grad / 2)


@pytest.mark.parametrize("backend", STACK_BACKENDS)
def test_dropout_is_the_same_where_layers_are_called(backend):
    net = net_of(backend=backend, dropout=0.3)
    dropped = net.drop(5, seeded(2))
    expected = run(net, dropped=dropped)
    net.fc2.register_forward_hook(nothing)
    assert_alike(run(net, dropped=dropped), expected)
    assert torch.equal(net.eval()(SAMPLES), net_of(backend=backend)(SAMPLES))
    for spikes in (False, True):  # over time have gradients if they are asked for
        assert [train.dense().requires_grad for train in net.simulate(SAMPLES, spikes=spikes).spikes] == 3 * [spikes]
    with pytest.raises(ValueError, match=r"dropped of population 0 must be bool \(5, 40\)"):
        net.train().simulate(SAMPLES, dropped=[torch.zeros(4, 40, dtype=torch.bool)] * 2)


@pytest.mark.ci
@compiles_whole
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_a_stack_with_hooks_compiles_to_equal_results(plain_memory):
    net = net_of()
    stack_of_two = SpikingStack([(net.fc1, Noisy(threshold=0.5)), (net.fc2, net.lif2)], T=2)
    net.fc2.register_forward_hook(nothing)
    compiled = torch.compile(stack_of_two, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(SAMPLES), stack_of_two(SAMPLES))
    assert stack_of_two(SAMPLES).sum() > 0


def test_it_is_said_once_which_layers_are_called_and_activity_hooks_are_called_once(caplog):
    called_layers._say_that_modules_are_called.cache_clear()
    net, seen = net_of(), []
    net(SAMPLES)
    assert "in turn" not in caplog.text
    net.register_activity_hook(lambda inputs, activity, state: seen.append(activity.counts))
    net.lif2.register_forward_hook(nothing)
    counts = [net(SAMPLES) for _ in range(2)]
    assert all(map(torch.equal, seen, counts))
    assert len(seen) == 2
    said = "a network calls its modules in turn, which is slower than one call for all: lif2 carries hooks"
    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [said]


def test_steps_follow_hooks_on_connections_and_say_what_they_cannot_follow(caplog):
    net, seen = net_of(), []
    net.fc2.register_forward_hook(lambda module, args, output: seen.append(output))
    net.step(SAMPLES)
    assert [output.shape for output in seen] == [(5, 40)]
    called_layers._say_that_steps_pass_by.cache_clear()
    net.lif2.register_forward_hook(nothing)
    net.step(SAMPLES)
    assert "hooks on lif2 are not run by a network's step" in caplog.text
    net.lif2 = Noisy()
    with pytest.raises(TypeError, match=r"lif2 \(Noisy\) has a forward of its own, but not a step that follows it"):
        net.step(SAMPLES)
    net.lif2 = nn.Sequential(LIF())
    with pytest.raises(TypeError, match=r"lif2 \(Sequential\) has no step"):
        net.step(SAMPLES)


def test_what_a_layer_may_not_return_is_named():
    net = net_of()
    net.lif1 = nn.Identity()
    net.lif2.register_forward_hook(lambda module, args, output: (output, output))
    with pytest.raises(TypeError, match=r"lif2 \(LIF\) returned a tuple; in a stack .* return a tensor \[6, 5, 40"):
        net(SAMPLES)
    net.fc1.register_forward_hook(lambda module, args, output: output[0])
    with pytest.raises(TypeError, match=r"fc1 \(G2GLinear\) returned a tensor \[40\]; .* a tensor \[5, 40\]"):
        net(SAMPLES)
