"""Recurrent layers: I_t = W·x_t + b + V·S_{t−1}, with gradients through S_{t−1}, on every backend and in every part."""

import pytest
import torch
from helpers import compiles_whole, rms, seeded
from networks import Reference, sparse_stack

from benchmarks.machine import pytorch_threads
from g2g_kernels import BlockMask, GroupLayout, available_backends
from g2g_kernels.triton.runtime import interpreted
from g2gnet import LIF, AdLIF, CubaLIF, G2GLinear, G2GNet, SpikingStack, Synaptic
from g2gnet.activity_recorder import ActivityRecorder, dense

B, SIZES = 5, (13, 38, 26, 7)
COMPILED = [name for name in ("cpu", "triton") if name in available_backends()]
SLOW = {"triton"} if interpreted() else set()


def interpreter_sizes(unit: int = 4) -> tuple[int, ...]:
    """For Triton's interpreter, to which every unit and step is a call; groups still end in clipped units."""
    unit = max(unit, 3)
    return (2 * unit - 1, 4 * unit - 2, 3 * unit - 1, unit + 2)


def stack_of(
    backend, unit=4, groups=3, kind="random", sizes=SIZES, T=6, neurons=LIF, per_neuron=True, dropout=0.0,  # noqa: N803
    recurrent=True, **options,
) -> SpikingStack:  # fmt: skip
    """Two recurrent layers and one without, or three without."""
    draw, of_layers = seeded(3), []
    for size in sizes[1:]:
        of_layers.append(neurons(size if per_neuron else None, threshold=0.5, backend=backend, **options))
        for value in [*of_layers[-1].by_name.values()][:-1]:
            value.data = 0.5 + 0.4 * torch.rand(value.shape, generator=draw)
    make = {"unit": unit, "groups": groups, "kinds": (kind, "index"), "dropout": dropout}
    return sparse_stack(sizes, of_layers, T, backend, recurrent=recurrent, gain=2.0, **make)


def inputs_of(stack: SpikingStack, held: bool, batch: int = B) -> torch.Tensor:
    size = stack.fc1.in_features
    return torch.rand((batch, size) if held else (stack.T, batch, size), generator=seeded(4)) * 2


def drawn_state(stack: SpikingStack, batch: int = B):
    draw, state = seeded(8), []
    for connection, neurons in stack.layers():
        states = [torch.rand(batch, connection.out_features, generator=draw) for _ in neurons.model.states]
        state.append(tuple(states) if len(states) > 1 else states[0])
    return state


def run(stack: SpikingStack, x: torch.Tensor, dtype: torch.dtype, state=None, **options) -> dict[str, torch.Tensor]:
    """Spikes, last states, and every gradient of a loss of counts, rates and last states."""
    stack = stack.to(dtype)
    leaf = x.to(dtype, copy=True).requires_grad_()
    named, first = {"x": leaf, **dict(stack.named_parameters())}, None
    if state is not None:
        first = []
        for number, each in enumerate(state):
            tensors = each if isinstance(each, tuple) else (each,)
            tensors = tuple(tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors)
            named |= {f"state {number} {part}": tensor for part, tensor in enumerate(tensors)}
            first.append(tensors if len(tensors) > 1 else tensors[0])
    activity = stack.simulate(leaf, first, **options)
    draw, loss = seeded(5), 0
    for part in (activity.counts, *(10 * rates for rates in activity.rates), *activity.states):
        loss = loss + (part * torch.randn(part.shape, generator=draw, dtype=torch.float64).to(part)).sum()
    found = torch.autograd.grad(loss, named.values(), allow_unused=True, materialize_grads=True)
    found = dict(zip(named, found, strict=True))
    found |= {f"spikes {number}": spikes.dense() for number, spikes in enumerate(activity.spikes)}
    return found | {f"last {number}": states.detach() for number, states in enumerate(activity.states)}


def assert_same(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        if name.startswith("spikes"):
            assert 0.02 < expected.mean() < 0.9, name  # else a comparison says little
            assert torch.equal(found[name].to(expected), expected), name
        else:
            assert rms(found[name] - expected) <= tolerance * rms(expected), name


@pytest.mark.parametrize(
    ("reset", "surrogate", "dropout"),
    [("subtract", "atan", 0.5), ("zero", "triangle", 0.0), ("none", "sigmoid", 0.0), ("zero", "atan", 0.5)],
)
def test_spikes_and_gradients_are_those_of_the_definition(reset, surrogate, dropout):
    """Neurons that are kept send themselves more, as they send the next layer more."""
    stack = stack_of("torch", reset=reset, surrogate=surrogate, dropout=dropout).double()
    x, dropped = inputs_of(stack, held=False).double(), stack.drop(B, seeded(2)) if dropout else None
    reference = Reference(stack)
    expected = reference.run(x, dict(zip(stack.populations, dropped or (), strict=False)), 1 / (1 - dropout))
    activity = stack.simulate(x, dropped=dropped, spikes=True)
    assert all(0.02 < train.mean() < 0.9 for train in expected.values())
    losses = []
    for trains in (expected.values(), (record.dense() for record in activity.spikes)):
        draw = seeded(1)
        losses.append(sum((each * torch.randn(each.shape, generator=draw)).sum() for each in trains))
    for ours, theirs in zip(activity.spikes, expected.values(), strict=True):
        assert torch.equal(ours.dense(), theirs)
    gradients = reference.gradients(losses[0], expected, x)
    losses[1].backward()
    found = {name: parameter.grad for name, parameter in stack.named_parameters()}
    torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-11)


#: every unit size, model, reset and surrogate, parameters per layer and per neuron, states, dropped neurons
CASES = {
    "units of 4": {},
    "held": {"held": True},
    "zero": {"reset": "zero", "surrogate": "sigmoid"},
    "none, boxcar": {"reset": "none", "surrogate": "boxcar", "alpha": 0.7, "state": True},
    "events": {"per_neuron": False, "surrogate": "triangle", "alpha": 2.0, "held": True},
    "events from a state": {"per_neuron": False, "surrogate": "triangle", "alpha": 4.0, "state": True},
    "events, dropped": {"per_neuron": False, "surrogate": "triangle", "alpha": 4.0, "dropped": True},
    "synaptic": {"neurons": Synaptic, "surrogate": "fast_sigmoid", "state": True, "dropped": True},
    "synaptic, zero, held": {"neurons": Synaptic, "reset": "zero", "per_neuron": False, "held": True},
    "adaptive": {"neurons": AdLIF, "surrogate": "triangle", "state": True, "dropped": True},
    "adaptive, zero, held": {"neurons": AdLIF, "reset": "zero", "per_neuron": False, "held": True},
    "current-based": {"neurons": CubaLIF, "reset": "none", "dropped": True, "refractory": 2, "T": 20},
    "current-based, held": {"neurons": CubaLIF, "reset": "none", "surrogate": "triangle", "held": True, "T": 24},
    "dropped, from a state": {"state": True, "dropped": True, "held": True},
    "single weights": {"unit": 1, "kind": "index"},
    "units of 8": {"unit": 8, "sizes": (13, 96, 64, 7), "kind": "interleaved"},
    "units of 16": {"unit": 16, "sizes": (40, 128, 96, 7), "kind": "index", "batch": 37},
    "units of 64": {"unit": 64, "sizes": (40, 260, 150, 7), "groups": 2, "kind": "index", "batch": 70, "T": 4},
    "chunks of 40 samples": {"unit": 16, "sizes": (13, 128, 26, 7), "kind": "index", "batch": 90, "T": 20},
    "chunks of 36, single weights": {"unit": 1, "sizes": (13, 128, 26, 7), "kind": "index", "batch": 50, "T": 24},
    "one sample": {"batch": 1},
    "two steps": {"T": 2, "state": True},
    "one step": {"T": 1},
    "not recurrent, from a state": {"recurrent": False, "state": True},
    "not recurrent, synaptic, from a state": {
        "recurrent": False, "state": True, "held": True, "neurons": Synaptic, "reset": "zero", "surrogate": "triangle",
    },
}  # fmt: skip

#: those for Triton's interpreter, which is slow; others are beside the kernels
INTERPRETED = ("zero", "events from a state", "synaptic", "adaptive, zero, held", "single weights")


@pytest.mark.parametrize(
    ("backend", "case"), [(name, case) for name in COMPILED for case in (INTERPRETED if name in SLOW else CASES)]
)
def test_compiled_kernels_give_what_float64_gives(backend, case):
    options = dict(CASES[case])
    held, state, dropped = (options.pop(name, False) for name in ("held", "state", "dropped"))
    batch = options.pop("batch", B)
    if backend in SLOW:
        options = {"T": 4} | options | {"sizes": interpreter_sizes(options.get("unit", 4))}
    options["dropout"] = 0.4 if dropped else 0.0
    exact = stack_of("torch", **options)
    x = inputs_of(exact, held, batch)
    arguments = {"state": drawn_state(exact, batch)} if state else {}
    if dropped:
        arguments["dropped"] = exact.drop(batch, seeded(9))
    expected = run(exact, x, torch.float64, **arguments)
    assert_same(run(stack_of(backend, **options), x, torch.float32, **arguments), expected, 2e-5)


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_one_step_without_a_state_gives_recurrent_weights_no_gradient(backend):
    stack = stack_of(backend, T=1, sizes=interpreter_sizes())
    stack(inputs_of(stack, held=False)).sum().backward()
    assert stack.fc1.values.grad.any()
    assert stack.rec1.values.grad is stack.rec2.values.grad is None


def test_results_do_not_depend_on_the_threads():
    found = []
    for number in (1, 2, 3):
        with pytorch_threads(number):
            stack = stack_of("cpu", unit=16, sizes=(40, 128, 96, 7), kind="index")
            found.append(run(stack, inputs_of(stack, held=False, batch=80), torch.float32))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_bfloat16_is_as_near_to_float32_as_a_loop_of_steps_is():
    stack = stack_of("cpu", unit=16, sizes=(40, 128, 96, 7), kind="index", per_neuron=False)
    for name, parameter in stack.named_parameters():  # currents that are exact in bfloat16, so that spikes are equal
        if name.endswith(("values", "bias")):
            scale = 16 if name.endswith("values") else 4
            parameter.data = (parameter.data * scale).round().clamp(-8, 8) / scale
    x = inputs_of(stack, held=False).round()
    expected = run(stack, x, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(stack, x, torch.float32)
    for name, exact in expected.items():
        if name.startswith("spikes"):
            assert torch.equal(found[name], exact), name
        elif not name.startswith("last"):  # three products of 8 bits in turn
            assert rms(found[name] - exact) <= 3 * 2**-8 * rms(exact), name


def in_another_order(backend: str) -> SpikingStack:
    """A stack whose first recurrent connection has other groups than the layer."""
    stack, draw = stack_of(backend), seeded(11)
    other = GroupLayout(SIZES[1], 2, "random", draw)
    recurrent = G2GLinear(BlockMask.sample(other, other, 1, 0.4, 5, draw), bias=False, generator=seeded(12))
    (first, _), *rest = zip(stack.layers(), stack.recurrents(), strict=True)
    layers = [(*first, recurrent), *[(*pair, joined) if joined is not None else pair for pair, joined in rest]]
    return SpikingStack(layers, stack.T, backend)


def test_another_order_of_neurons_runs_step_by_step_and_says_so():
    x = inputs_of(in_another_order("torch"), held=True)
    expected = run(in_another_order("torch"), x, torch.float64)
    found = run(in_another_order("cpu"), x, torch.float32)
    said = in_another_order("cpu").explain(x)
    assert said.way.name == "operators in turn"
    assert "population 0 has other groups" in said.reasons["cpu chain"]
    assert_same(found, expected, 2e-5)


def test_another_order_of_neurons_runs_under_autocast():
    x, found = inputs_of(in_another_order("torch"), held=True), {}
    for backend in ("torch", "cpu"):
        stack = in_another_order(backend)
        with torch.autocast("cpu", torch.bfloat16):
            counts = stack(x)
        counts.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in stack.parameters() if parameter.grad is not None)
        found[backend] = counts.detach()
    assert found["torch"].any()
    assert found["cpu"].dtype == found["torch"].dtype
    assert rms(found["cpu"] - found["torch"]) < 0.1 * rms(found["torch"])  # products are rounded otherwise


@pytest.mark.ci
@compiles_whole
def test_another_order_of_neurons_is_refused_in_compiled_code(plain_memory):
    stack = in_another_order("cpu")
    with pytest.raises(ValueError, match=r"compiled code cannot run on backend cpu; give `backend='torch'`"):
        torch.compile(stack, backend="aot_eager")(inputs_of(stack, held=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("change", ["threshold", "state before", "state after"])
def test_spikes_at_the_ends_of_a_run_are_those_of_the_run_after_a_change(change):
    stack = stack_of("cpu")
    before = drawn_state(stack)
    with torch.no_grad():
        activity = stack.simulate(inputs_of(stack, held=False), before)
        counted = activity.synaptic_operations()
        changed = {"threshold": stack.lif1.threshold, "state before": before[0], "state after": activity.state[0]}
        changed[change].mul_(0.5)
    assert activity.synaptic_operations() == counted


def test_hooks_see_every_step_of_a_recurrent_connection():
    stack = stack_of("cpu")
    x = inputs_of(stack, held=True)
    expected = stack.simulate(x)
    calls = []
    stack.rec2.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    found = stack.simulate(x)
    assert len(calls) == stack.T - 1
    assert torch.equal(torch.stack(calls), expected.spikes[1].dense()[:-1])
    assert torch.equal(found.counts, expected.counts)
    assert found.synaptic_operations() == expected.synaptic_operations()
    stack.lif2.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="lif2 carries hooks, which would not be run"):
        stack.simulate(x)


@pytest.mark.parametrize("model", ["index", "random", "mixer", "dense", "small_world"])
def test_recurrent_connections_have_the_groups_of_their_layer(model):
    net, plain = (G2GNet(20, 64, 5, model, block_size=8, recurrent=r, generator=seeded(1)) for r in (True, False))
    assert list(net.connections()) == ["fc1", "rec1", "fc2", "rec2", "fc3"]
    for connection, recurrent in ((net.fc1, net.rec1), (net.fc2, net.rec2)):
        for side in (recurrent.mask.rows, recurrent.mask.cols):
            assert torch.equal(side.layout.group_of, connection.mask.rows.layout.group_of)
        assert recurrent.bias is None
        assert recurrent.mask.is_full == (model == "dense")
    for name, connection in plain.connections().items():  # the same seed gives the same layers without them
        assert connection.mask.equals(net.connections()[name].mask)
        assert torch.equal(connection.values, net.connections()[name].values)


def test_density_and_gain_of_recurrent_connections_are_their_own():
    def net_of(**options) -> G2GNet:
        return G2GNet(20, 64, 5, block_size=8, recurrent=True, p_inter=0.3, generator=seeded(1), **options)

    net, erk, uniform = net_of(p_rec_inter=0.0, rec_gain=0.5), net_of(density="erk"), net_of()
    assert net.rec1.mask.density == pytest.approx(1 / 8)
    assert net.rec1.values.abs().max() <= 0.5 / 8**0.5
    weights = [sum(each.mask.num_weights for each in of.connections().values()) for of in (erk, uniform)]
    assert weights[0] == pytest.approx(weights[1], rel=0.1)  # units are drawn
    assert erk.rec1.mask.density < uniform.rec1.mask.density  # of the larger layers


@pytest.mark.parametrize(("steps", "readout"), [(1, "counts"), (4, "counts"), (4, "last")])
def test_rewiring_sees_the_spikes_before_a_part_of_a_run(steps, readout):
    """Parts that continue one another, and single steps, record what one run does."""
    net = G2GNet(20, 64, 5, block_size=8, T=8, recurrent=True, threshold=0.3, generator=seeded(1), readout=readout)
    x = torch.rand(8, 7, 20, generator=seeded(2)) * 2

    def recorded(inputs, run):
        recorder, state = ActivityRecorder(net, list(net.connections().values())), None
        recorder.start()
        for each in inputs:
            state = run(each, state)
        return recorder.stop()

    whole = recorded([x], lambda x, state: net.simulate(x).state)
    parts = recorded(x.split(steps), lambda part, state: net.simulate(part, state).state)
    singly = recorded(x, lambda now, state: net.step(now, state)[1])
    assert dense(whole[1][0][0]).any()
    for of_layers in (parts, singly):
        for ours, ((pre, post),) in zip(of_layers, whole, strict=True):
            sent = torch.cat([dense(each).reshape(-1, 7, dense(pre).shape[-1]) for each, _ in ours])
            assert torch.equal(sent, dense(pre))
            assert torch.equal(torch.cat([dense(each) for _, each in ours]), dense(post))
