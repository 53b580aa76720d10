"""Layers and networks under torch.func, batched gradients, torch.jit.trace and torch.device("meta")."""

import copy
import functools
import io
import warnings

import pytest
import torch
from helpers import backends_of, row_with, seeded
from networks import small_net
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.ops import neurons as neurons_module
from g2g_kernels.ops.g2g_stack import WAYS
from g2gnet import LIF, G2GLinear, Synaptic

STACK_BACKENDS = backends_of(WAYS)
STEPS = 6
SAMPLES = torch.rand(5, 30, generator=seeded(1)) * 3
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning"),
]


net_of = functools.partial(small_net, T=STEPS, threshold=0.5)


def close(one, other):
    # float32 sums in two orders, through 6 steps and 3 layers
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert other.any()


CURRENT = torch.rand(STEPS, 2, 8, generator=seeded(1))
#: what is called, and with what
PARTS = {
    "neurons": lambda backend: (Synaptic(neurons=8, threshold=0.5, backend=backend), CURRENT),
    "network": lambda backend: (net_of(backend=backend), SAMPLES),
}


@pytest.mark.parametrize("backend", STACK_BACKENDS)
@pytest.mark.parametrize("part", PARTS)
def test_a_batch_of_gradients_is_that_of_one_after_the_other(part, backend):
    function, x = PARTS[part](backend)
    inputs = [x.clone().requires_grad_(), *function.parameters()]
    y = function(inputs[0])
    many = torch.randn(3, *y.shape, generator=seeded(2))
    expected = [torch.autograd.grad(y, inputs, each, retain_graph=True) for each in many]
    at_once = torch.autograd.grad(y, inputs, many, retain_graph=True, is_grads_batched=True)
    mapped = vmap(lambda each: torch.autograd.grad(y, inputs, each, retain_graph=True))(many)
    for one, other, each in zip(at_once, mapped, zip(*expected, strict=True), strict=True):
        close(one, torch.stack(each))
        close(other, torch.stack(each))


@pytest.mark.parametrize("backend", STACK_BACKENDS)
def test_second_derivatives_of_a_batch_of_gradients_are_those_of_one_after_the_other(backend):
    net, x = net_of(backend=backend), SAMPLES.clone().requires_grad_()
    many = torch.rand(3, 5, 10, generator=seeded(2))
    (first,) = torch.autograd.grad(net(x), x, many, is_grads_batched=True, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    each = [torch.autograd.grad(net(x), x, one, create_graph=True)[0] for one in many]
    close(second, torch.autograd.grad(torch.stack(each).square().sum(), x)[0])


@pytest.mark.parametrize("backend", [None, *STACK_BACKENDS])
@pytest.mark.parametrize("neuron", ["lif", "synaptic", "adlif"])
def test_gradients_of_every_sample_are_those_of_samples_alone(neuron, backend):
    net, labels = net_of(neuron=neuron, per_neuron=True, backend=backend), torch.arange(5)

    def loss(parameters, x, label):
        return nn.functional.cross_entropy(functional_call(net, parameters, (x[None],)), label[None])

    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    every = vmap(grad(loss), (None, 0, 0))(parameters, SAMPLES, labels)
    for number in range(5):
        net.zero_grad()
        nn.functional.cross_entropy(net(SAMPLES[number : number + 1]), labels[number : number + 1]).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(every[name][number], parameter.grad, rtol=1e-3, atol=1e-4)
    assert all(gradient.any() for gradient in every.values())


def test_it_is_said_once_that_neurons_take_steps_there(caplog):
    neurons_module._say_that_it_takes_steps.cache_clear()
    net = net_of()
    for _ in range(2):
        assert torch.equal(vmap(lambda x: net(x[None])[0])(SAMPLES), net(SAMPLES))
    assert caplog.text.count("inside torch.func transforms and torch.jit.trace, neurons run step by step") == 1


def test_dropout_is_drawn_for_every_element_of_a_vmap():
    net = net_of(dropout=0.3)
    same = SAMPLES[:1].expand(50, 30)
    torch.manual_seed(0)
    counts = vmap(lambda x: net.simulate(x[None]).rates[0], randomness="different")(same)
    assert len(counts.unique(dim=0)) > 10
    silent = (counts == 0).float().mean(0)
    fires = net.eval().simulate(SAMPLES[:1]).rates[0] > 0
    assert fires.any()
    # five standard deviations of the mean of 50 draws
    assert (silent[fires] - 0.3).abs().max() < 5 * (0.3 * 0.7 / 50) ** 0.5


@pytest.mark.parametrize("backend", STACK_BACKENDS)
def test_an_ensemble_of_one_wiring_runs_under_vmap_and_one_of_several_is_refused(backend):
    nets = [net_of(backend=backend) for _ in range(3)]
    for number, net in enumerate(nets):
        for parameter in net.parameters():
            parameter.data.mul_(1 + 0.1 * number)
    base, mask = copy.deepcopy(nets[0]), nets[1].fc2.mask

    def ensemble():
        return vmap(lambda *state: functional_call(base, state, (SAMPLES,)))(*stack_module_state(nets))

    counts = ensemble()
    assert torch.equal(counts, torch.stack([net(SAMPLES) for net in nets]))
    assert not torch.equal(counts[0], counts[1])
    close(base(SAMPLES), nets[0](SAMPLES))
    # the same units, in other slots
    mask.load_state_dict({"wiring": row_with(mask, unit_row=lambda t: t.flip(0), unit_col=lambda t: t.flip(0))})
    with pytest.raises(ValueError, match=r"networks with different wirings cannot share one torch\.func\.vmap"):
        ensemble()


def traced(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of comparisons of sizes
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(module, (x,)), file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("backend", STACK_BACKENDS)
@pytest.mark.parametrize("x", [SAMPLES, SAMPLES.expand(3, 5, 30)], ids=["held", "over time"])
def test_a_traced_network_gives_the_same_counts_and_gradients(x, backend):
    net = net_of(backend=backend, T=3)
    script = traced(net, x)
    for inputs in (x, x[..., :3, :]):
        assert torch.equal(script(inputs), net(inputs))
    assert net(x).sum() > 0
    script(x).square().sum().backward()
    net(x).square().sum().backward()
    for name, parameter in script.named_parameters():
        close(parameter.grad, net.get_parameter(name).grad)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_a_trace_holds_plain_operations_unless_a_backend_is_named(backend):
    """As converters and profilers want it."""
    net, current = net_of(backend=backend), torch.rand(STEPS, 5, 30, generator=seeded(2))
    for module, x in ((net.fc1, SAMPLES), (LIF(threshold=0.5, backend=backend), current)):
        few = x[..., :3, :]
        torch.testing.assert_close(traced(module, x)(few), module(few))
    with torch.no_grad():
        graph = str(traced(net_of(backend=backend, T=2), SAMPLES).inlined_graph)
    assert [word in graph for word in ("aten::", "g2g::", "PythonOp")] == [True, False, False]


def test_a_network_built_without_memory_takes_a_state():
    saved = net_of()
    with torch.device("meta"):
        net = net_of(seed=1)
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"meta"}
    assert net(SAMPLES.to("meta")).shape == (5, 10)
    assert "density=unknown" in repr(net)
    net.to_empty(device="cpu")
    net.load_state_dict(saved.state_dict())
    assert torch.equal(net(SAMPLES), saved(SAMPLES))


def test_masks_are_drawn_on_the_cpu_whatever_the_default_device():
    def build():
        return BlockMask.sample(GroupLayout(40, 4, "random", seeded(0)), GroupLayout(30, 4), 1.0, 0.3, 4, seeded(1))

    expected = build()
    state = expected.state_dict()
    with torch.device("meta"):
        mask, layer = build(), G2GLinear(build())
        again, loaded = BlockMask.from_dense(expected.to_dense()), BlockMask.from_state(state)
    assert all(torch.equal(each.to_dense(), expected.to_dense()) for each in (mask, again))
    assert torch.equal(loaded.unit_row, expected.unit_row)
    assert layer.values.is_meta
    assert layer.mask.unit_row.is_meta
