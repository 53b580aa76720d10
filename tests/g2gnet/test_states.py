"""States into and out of a stack: parts in turn are the whole, and chunks change only how much memory a run takes."""

import math

import numpy as np
import pytest
import torch
from covering import every_pair
from helpers import backends_of, rms, seeded
from networks import three_layers
from torch.utils import _pytree as pytree

from g2g_kernels.ops.g2g_stack import WAYS, cpu, ways
from g2gnet import LIF, G2GNet, Synaptic

T, B, D = 10, 3, 12
BACKENDS = backends_of(WAYS)
stack_of = three_layers


def inputs_of() -> torch.Tensor:
    return (torch.rand(T, B, D, generator=seeded(4)) * 2).requires_grad_()


def tensors_of(state) -> list[torch.Tensor]:
    return [tensor for each in state for tensor in (each if isinstance(each, tuple) else (each,))]


def loss_of(counts, rates, state) -> torch.Tensor:
    """Of counts, rates and every state."""
    draw = seeded(5)
    parts = [counts, *rates, *tensors_of(state)]
    return sum((part * torch.randn(part.shape, generator=draw, dtype=torch.float64).to(part)).sum() for part in parts)


#: of the gradients that follow
NEAR = {"of the last layers": 2e-5, "of the last membranes": 2e-5, "autocast": 0.02, "in a batch": 1e-3, "second": 1e-3}


def gradients_of(scene: str, backend: str, chunk: int | None):
    stack, x = stack_of(backend, readout="last" if scene == "of the last membranes" else "counts"), inputs_of()
    if scene == "of the last layers":
        for frozen in (stack.fc1, stack.lif1, x):
            frozen.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, scene == "autocast"):
        activity = stack.simulate(x, chunk=chunk)
    counts = activity.counts
    if scene == "in a batch":
        many = torch.randn(3, *counts.shape, generator=seeded(3))
        return [torch.vmap(lambda upstream: torch.autograd.grad(counts, x, upstream, retain_graph=True)[0])(many)]
    if scene == "second":
        (first,) = torch.autograd.grad(counts.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)
    learned = [each for each in (x, *stack.parameters()) if each.requires_grad]
    return torch.autograd.grad(loss_of(activity.output, activity.rates, activity.state), learned)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's loop over a batch
@every_pair(backend=BACKENDS, scene=NEAR)
def test_gradients_of_chunks_are_those_of_the_whole(backend, scene):
    chunked, whole = (gradients_of(scene, backend, chunk) for chunk in (4, None))
    assert all(rms(ours - theirs) <= NEAR[scene] * rms(theirs) for ours, theirs in zip(chunked, whole, strict=True))
    assert [each.any() for each in whole].count(False) <= (scene == "of the last membranes")  # no threshold there


@every_pair(backend=BACKENDS, chunk=(None, 2))
def test_truncated_gradients_are_those_of_parts_from_states_without_one(backend, chunk):
    stack, x = stack_of(backend), inputs_of()
    learned = [x, *stack.parameters()]
    activity = stack.simulate(x, truncate=4, chunk=chunk)
    truncated = torch.autograd.grad(loss_of(activity.counts, activity.rates, activity.state), learned)
    counts, rates, state = 0, [torch.zeros(size) for size in stack.sizes[: stack.depth]], None
    for part in x.split(4):
        activity = stack.simulate(part, state)
        counts = counts + activity.counts
        rates = [rate + len(part) / T * of_part for rate, of_part in zip(rates, activity.rates, strict=True)]
        state = pytree.tree_map(torch.detach, activity.state)
    state = activity.state
    expected = torch.autograd.grad(loss_of(counts, rates, state), learned)
    whole = torch.autograd.grad(stack.simulate(x).counts.sum(), x)[0]
    assert all(rms(ours - theirs) <= 2e-5 * rms(theirs) for ours, theirs in zip(truncated, expected, strict=True))
    assert rms(whole - torch.autograd.grad(stack.simulate(x, truncate=4).counts.sum(), x)[0]) > 1e-2 * rms(whole)
    assert torch.equal(stack.simulate(x, truncate=T).counts, stack.simulate(x).counts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [np.int64, torch.tensor])
def test_steps_of_a_chunk_may_be_any_whole_number_under_a_profiler_too(backend, whole):
    stack, x = stack_of(backend), inputs_of()
    wanted = torch.autograd.grad(stack.simulate(x, chunk=4).counts.sum(), x)[0]
    cut = torch.autograd.grad(stack.simulate(x, truncate=4).counts.sum(), x)[0]
    with torch.profiler.profile():
        assert torch.equal(torch.autograd.grad(stack.simulate(x, chunk=whole(4)).counts.sum(), x)[0], wanted)
        assert torch.equal(torch.autograd.grad(stack.simulate(x, truncate=whole(4)).counts.sum(), x)[0], cut)


def test_chunks_keep_no_states_of_single_steps():
    """But for inputs and parameters their graph holds the states at borders, that of a whole run those of all steps."""
    kept = []
    for chunk in (None, 4):
        stack, x, sizes = stack_of("torch"), inputs_of(), {}

        def note(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            activity = stack.simulate(x, chunk=chunk)
        kept.append(sum(sizes.values()) - x.nbytes - sum(each.nbytes for each in stack.parameters()))
        assert activity.counts.any()
    assert kept[1] < kept[0] / 2


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels were not built")
def test_one_operator_runs_the_chunks_of_a_chain_but_of_inputs_that_it_would_copy(monkeypatch):
    stack, generic = stack_of("cpu"), []
    inner = ways.in_chunks
    monkeypatch.setattr(ways, "in_chunks", lambda *given: generic.append(given) or inner(*given))
    x, found = inputs_of().detach()[0].requires_grad_(), []
    for given in (x, x.expand(T, B, D), x.repeat(T, 1, 1)):
        activity = stack.simulate(given, chunk=4)
        found.append((activity.counts, *torch.autograd.grad(loss_of(*activity[:2], activity.state), x)))
    assert len(generic) == 1
    monkeypatch.setattr(cpu, "MOST_STEPS", 4)  # of a part, however long the run
    assert torch.equal(stack.simulate(x, chunk=4).counts, found[0][0])
    assert len(generic) == 1
    assert all(torch.equal(found[0][0], counts) for counts, _ in found)
    assert found[0][0].any()
    assert all(rms(grad - found[0][1]) <= 2e-5 * rms(grad) for _, grad in found)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels were not built")
@pytest.mark.parametrize("unit", [1, 16, 64])
def test_what_reaches_the_last_states_is_an_event_of_the_last_step(unit, monkeypatch):
    """Every neuron lists an event there: against float64, and in other bits than by the product."""
    results = {}
    for how, share in (("torch", 0.0), ("product", 0.0), ("events", math.inf)):
        monkeypatch.setattr(cpu, "GRADIENT_EVENT_LIMIT", dict.fromkeys((False, True), share))
        options = {"block_size": unit, "surrogate": "triangle", "threshold": 0.4, "generator": seeded(0), "T": 12}
        net = G2GNet(30, [130, 70], 5, backend="torch" if how == "torch" else "cpu", **options)
        net.to(torch.float64 if how == "torch" else torch.float32)
        x = torch.rand(12, 6, 30, generator=seeded(1)).to(next(net.parameters()).dtype).requires_grad_()
        activity = net.simulate(x)
        assert activity.rates[1].any()
        loss = activity.counts.sum() + sum((each.cos() * 3).sum() for each in activity.state)
        results[how] = torch.autograd.grad(loss, [x, *net.parameters()])
    for exact, product, events in zip(*results.values(), strict=True):
        assert rms(events.double() - exact) <= 1e-5 * rms(exact)
        assert rms(product.double() - exact) <= 1e-5 * rms(exact)
    assert not torch.equal(results["product"][0], results["events"][0])


@every_pair(backend=BACKENDS, chunk=(None, 4))
def test_dropped_neurons_stay_silent_in_every_part_and_leave_no_state(backend, chunk):
    stack, x = stack_of(backend, dropout=0.4).train(), inputs_of()
    dropped = stack.drop(B, seeded(6))
    whole = stack.simulate(x, dropped=dropped)
    half = stack.simulate(x[:6], dropped=dropped, chunk=chunk)
    rest = stack.simulate(x[6:], half.state, chunk, dropped=dropped)
    assert torch.equal(half.counts + rest.counts, whole.counts)
    for spikes, of_layer, states in zip(rest.spikes, dropped, rest.states, strict=False):
        assert of_layer.any()
        assert spikes.dense()[:, of_layer].count_nonzero() == 0
        assert states[:, of_layer].count_nonzero() == 0
    losses = loss_of(half.counts + rest.counts, [], rest.state), loss_of(whole.counts, [], whole.state)
    found = (torch.autograd.grad(loss, [x, *stack.parameters()]) for loss in losses)
    assert all(rms(ours - theirs) <= 2e-5 * rms(theirs) for ours, theirs in zip(*found, strict=True))


def test_one_draw_drops_the_same_neurons_in_all_chunks_and_is_given_to_every_part():
    torch.manual_seed(0)
    stack, x = stack_of(dropout=0.5).train(), inputs_of()
    whole = stack.simulate(x + 1, chunk=3)
    torch.manual_seed(0)
    assert (whole.spikes[0].dense() == 0).all(0)[stack.drop(B)[0]].all()
    with pytest.raises(ValueError, match=r"give it to every part"):
        stack.simulate(x, whole.state)
    assert stack.eval().simulate(x, whole.state).counts.shape == (B, 5)


def test_states_that_do_not_fit_are_refused_by_name():
    stack, drops, x = stack_of(), stack_of(dropout=0.5).train(), inputs_of()
    state = stack.simulate(x).state
    current, drawn = torch.rand(3, 7), drops.drop(B)
    for samples, other, match in (
        (B, state[:2], "state has 2 entries, this network has 3 populations"),
        (2, state, r"state of population 0 has shape \(1, 3, 22\); expected \(1, 2, 22\)"),
        (B, (state[0], state[1][0], state[2]), "synaptic_current, membrane"),
        (B, (state[0] > 0, *state[1:]), "state of population 0 must be a floating-point tensor"),
        (B, (state[0].double(), *state[1:]), r"state of population 0 is torch.float64.* state.to\(torch.float32\)"),
        (B, (*state[:2], state[2].to("meta")), "state of population 2 is on meta, x on cpu"),
    ):
        with pytest.raises(ValueError, match=match):
            stack.simulate(x[:, :samples], other)
    for call, match in (
        (lambda: LIF().step(current, torch.zeros(4, 7)), r"has shape \(4, 7\), the current \(3, 7\); give None"),
        (lambda: Synaptic().step(current, current), "1 states given, synaptic neurons have synaptic_current, mem"),
        (lambda: stack.step(x[0], state[:1]), "state has 1 entries, this network has 3 populations"),
        *((lambda chunk=chunk: stack.simulate(x, chunk=chunk), "chunk=") for chunk in (0, 2.5, True)),
        (lambda: stack.simulate(x, chunk=4, spikes=True), "give one of them"),
        (lambda: drops.simulate(x, dropped=drawn[:1]), r"of 1 populations, but 2 can drop neurons; give .* drop\(3\)"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for other, match in (
        (stack.simulate(x), "state is a Activity, .* give activity.state of a run"),
        (state[0], "state is a Tensor"),
        ((*state[:2], state[2].detach().numpy()), "state of population 2 is a ndarray, not a tensor"),
        (((None,), *state[1:]), "state of population 0 is a tuple"),
    ):
        for call in (lambda state: stack.simulate(x, state), lambda state: stack.step(x[0], state)):
            with pytest.raises(TypeError, match=match):
                call(other)


def test_a_layer_without_a_state_begins_with_zeros_and_a_stack_that_calls_its_layers_has_none():
    stack, x = stack_of(), inputs_of()
    state = stack.simulate(x).state
    one = stack.simulate(x[:1], (state[0], None, state[2]))
    zeros = tuple(map(torch.zeros_like, state[1]))
    assert torch.equal(one.counts, stack.simulate(x[:1], (state[0], zeros, state[2])).counts)
    assert torch.equal(one.counts, stack.step(x[0], (state[0], None, state[2]))[0])
    stack.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="step"):
        _ = stack.simulate(x).state
    for given in ({"state": state}, {"chunk": 4}, {"truncate": 4}):
        with pytest.raises(ValueError, match="fc1 carries hooks"):
            stack.simulate(x, **given)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("changed", ["units", "weights", "dropped"])
def test_what_changes_before_the_backward_pass_is_refused(chunk, changed):
    stack, x = stack_of(dropout=0.5 if changed == "dropped" else 0.0).train(), inputs_of()
    dropped = stack.drop(B)
    counts = stack.simulate(x, chunk=chunk, dropped=dropped).counts
    _, (connection, _), _ = stack.layers()
    absent = (~connection.mask.present()).nonzero()[:1]
    with torch.no_grad():
        if changed == "units":
            connection.mask.relabel_(torch.tensor([0]), absent[:, 0], absent[:, 1])
        elif changed == "dropped":
            dropped[0].logical_not_()
        else:
            connection.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        counts.sum().backward()
