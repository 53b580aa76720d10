"""Weights in lists: the values of both kernels against float64, when they are chosen, and that nothing of N × N is
formed."""

import gc
import random

import pytest
import torch
from covering import every_pair
from helpers import chained, seeded

from benchmarks.machine import pytorch_threads
from g2g_kernels import BlockMask, Connection, GroupLayout, Neurons, Population, g2g_linear, g2g_stack
from g2g_kernels.cpu import library, plans
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.g2g_stack import Delay, chunks, explain, recurrent_lists
from g2g_kernels.ops.neurons import MODELS, RESETS
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.ops.record import built, opened
from g2gnet import LIF, Projection, SpikingNetwork

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="the compiled kernels are not built")

#: as of every kernel: of a tensor relative to its largest number; of a sum whose parts cancel, to the sum of their
#: sizes
CLOSE = 2e-5
#: of the neurons of a range of lists at most: one range, several, and one of numbers of 32 bits
RANGES = (plans.MOST_OTHERS, 17, 2**31 - 1)


@pytest.fixture(autouse=True)
def only_lists(monkeypatch):
    """Every mask of small units goes by lists, and no kernel reads what nobody wrote."""
    monkeypatch.setattr(library, "LIST_COST", 0.0)
    monkeypatch.setattr(workspace, "poison", True)


def cut_lists(monkeypatch, in_a_range: int) -> None:
    monkeypatch.setattr(plans, "MOST_OTHERS", in_a_range)
    monkeypatch.setattr(plans, "LEAST_IN_LIST", 0)


def layout(size: int, seed: int = 0) -> GroupLayout:
    return GroupLayout(size, min(4, size), kind="random", generator=seeded(seed))


def weights(out: int, into: int, block_size: int, density: float, seed: int = 0, scale: float = 1.0):
    """A mask and packed weights; padding holds NaN, which nothing may read."""
    draw = {"density": density, "block_size": block_size, "generator": seeded(seed)}
    mask = BlockMask.sample(layout(out, seed), layout(into, seed), **draw)
    values = scale * torch.randn(mask.num_units, *mask.unit_shape, generator=seeded(seed + 1), dtype=torch.float64)
    return mask, values.float().masked_fill(~mask.valid(), torch.nan)


def assert_close(found, expected, mask=None, scale=None) -> None:
    if mask is not None:  # the gradient of padding is 0
        assert not found[~mask.valid()].any()
    assert (found.double() - expected).abs().max() <= CLOSE * (scale or expected.abs().max() + 1e-30)


SIZES = {"rows": (1, 15, 16, 17, 700), "sizes": ((1, 1), (37, 64), (300, 21), (129, 513)), "block_size": (1, 3, 15)}


@pytest.mark.parametrize("count", [5, 70_000 * 2 * plans.LEAST_IN_LIST])
def test_few_weights_of_many_neurons_are_not_cut_and_take_no_memory_of_ranges(count, monkeypatch):
    size, lengths = 70_000, []
    made = plans.Plan.__init__

    def new(self, mask, packed, owners=None, length=0):
        lengths.append(length)
        made(self, mask, packed, owners, length)

    monkeypatch.setattr(plans.Plan, "__init__", new)
    one_by_one = GroupLayout(size, 1)
    place = torch.linspace(0, size * size - 1, count, dtype=torch.float64).long().unique()
    mask = BlockMask(one_by_one, one_by_one, place // size, place % size, 1)
    values = torch.randn(count, 1, 1, generator=seeded(1), requires_grad=True)
    x = torch.randn(2, size, generator=seeded(2), requires_grad=True)
    y = g2g_linear(x, values, mask, backend="cpu")
    y.backward(torch.ones_like(y))
    expected = torch.zeros(2, size, dtype=torch.float64).index_add(
        1, mask.unit_row, x.double()[:, mask.unit_col] * values.flatten()
    )
    assert_close(y, expected)
    assert_close(values.grad.flatten(), x.double().sum(0)[mask.unit_col])
    of_inputs = torch.zeros(size, dtype=torch.float64).index_add(0, mask.unit_col, values.detach().double().flatten())
    assert_close(x.grad, of_inputs.expand(2, size))
    assert set(lengths) == {size if count == 5 else plans.MOST_OTHERS}


@every_pair(**SIZES, density=(0.0, 0.03, 0.6), inputs=("floats", "spikes"), bias=(False, True), in_a_range=RANGES)
def test_a_linear_layer_is_that_of_float64(monkeypatch, rows, sizes, block_size, density, inputs, bias, in_a_range):
    cut_lists(monkeypatch, in_a_range)
    mask, values = weights(*sizes, block_size, density)
    x = torch.randn(rows, sizes[1], generator=seeded(3))
    x = (x > 1).float() if inputs == "spikes" else x
    grad = torch.randn(rows, sizes[0], generator=seeded(4))
    ours = [x.requires_grad_(), values.requires_grad_(), *([torch.randn(sizes[0]).requires_grad_()] if bias else [])]
    y = g2g_linear(ours[0], ours[1], mask, *ours[2:], backend="cpu")
    y.backward(grad)
    exact = [each.detach().double().nan_to_num().requires_grad_() for each in ours]
    expected = g2g_linear(exact[0], exact[1], mask, *exact[2:], backend="torch")
    expected.backward(grad.double())
    assert_close(y.detach(), expected.detach(), scale=expected.abs().max().item() + 1)
    for mine, theirs, of in zip(ours, exact, (None, mask, None), strict=False):
        if mine.numel():
            assert_close(mine.grad, theirs.grad, of)


NEURONS = {"model": MODELS, "reset": RESETS, "surrogate": SURROGATES}
WITH_OR_WITHOUT = dict.fromkeys(("held", "state", "dropped", "per_neuron"), (False, True))


@every_pair(
    **NEURONS,
    size=(1, 63, 130),
    batch=(1, 2, 3, 8, 19),
    block_size=(1, 3),
    **WITH_OR_WITHOUT,
    to_membrane=(False, True, "alone"),
    threads=(1, 2),
    summed=(False, True),
    delay=(1, 2, 3, 5, 18),
    in_a_range=RANGES,
)
def test_a_loop_over_all_steps_is_that_of_float64(
    monkeypatch, model, reset, surrogate, size, batch, block_size, held, state, dropped, per_neuron, to_membrane,
    threads, summed, delay, in_a_range,
):  # fmt: skip
    cut_lists(monkeypatch, in_a_range)
    steps, names = 13, MODELS[model].parameters
    draw = seeded(size + batch)
    mask, values = weights(size, size, block_size, 0.2, scale=0.5)
    inputs, of_inputs = weights(size, 20, block_size, 0.4, seed=5)
    shapes = (batch, 20) if held else (steps, batch, 20)
    x = 1.3 * torch.randn(shapes, generator=draw)
    count = size if per_neuron else 1
    spans = [{"threshold": (0.3, 0.7), "refractory": (0.0, 3.0)}.get(name, (0.6, 0.3)) for name in names]
    parameters = [torch.rand(count, generator=draw) * span + least for span, least in spans]
    first = torch.randn(len(MODELS[model].states), batch, size, generator=draw) if state else None
    silent = torch.rand(batch, size, generator=draw) < 0.2 if dropped else None
    neurons = Neurons(model, tuple(parameters), reset, surrogate, 2.0)
    own = (mask, values), (inputs, of_inputs), neurons, first, silent, steps if held else None, threads, summed
    check_loop(x, *own, delay, to_membrane)


def check_loop(x, recurrent, inputs, neurons, first, silent, steps, threads, summed=False, delay=1, to_membrane=False):
    """Compares all that a recurrent layer gives, and all gradients, with float64; each pair is a mask and weights."""
    (mask, values), (in_mask, of_inputs), batch, size = recurrent, inputs, x.shape[-2], recurrent[0].shape[0]
    model = MODELS[neurons.model]
    sent = (torch.rand(delay, batch, size, generator=seeded(size)) < 0.2).float()
    if first is None or (delay == 1 and model.compared is None):
        sent = None
    ports = [None]
    if to_membrane and model.takes is not None:
        ports = ["membrane"] if to_membrane == "alone" else [None, "membrane"]
    of_counts, of_last = (torch.randn(batch, size, generator=seeded(size)) for _ in range(2))

    def run(backend, dtype):
        leaves = [
            each if each is None else each.detach().to(dtype).nan_to_num().requires_grad_()
            for each in (x, values, of_inputs, first, sent, *neurons.parameters)
        ]
        feeds = [Connection("linear", leaves[2], in_mask, -1, onto=port) for port in ports]
        joined = Connection("linear", leaves[1], mask, 0, Delay(delay, delay))
        own = neurons._replace(parameters=tuple(leaves[5:]))
        layer = Population(own, (*feeds, joined), silent, leaves[3], leaves[4])
        if backend == "cpu":
            chosen = explain(leaves[0], [layer], steps, backend).way.name
            of_events = neurons.model == "cubalif" and SURROGATES[neurons.surrogate].compact
            assert chosen == ("cpu events" if of_events else "cpu lists")
        activity = g2g_stack(leaves[0], [layer], steps, backend=backend)
        last = activity.states[0]  # the gradient of a plain sum is one number in memory
        loss = (activity.counts * of_counts.to(dtype)).sum() + (last if summed else last * of_last.to(dtype)).sum()
        for each in activity.sent or ():
            loss = loss + (0 if each is None else (each.dense() * of_last.to(dtype)).sum())
        loss.backward()
        return activity, [None if each is None else each.grad for each in leaves]

    with pytorch_threads(threads):
        activity, grads = run("cpu", torch.float32)
    expected, exact = run("torch", torch.float64)
    assert torch.equal(activity.spikes[0].dense().double(), expected.spikes[0].dense())
    assert_close(activity.states[0].detach(), expected.states[0].detach())
    for mine, theirs in zip(grads[:5], exact[:5], strict=True):
        if mine is not None and mine.numel():  # nothing has arrived within fewer steps than the delay
            assert_close(mine, torch.zeros_like(mine, dtype=torch.float64) if theirs is None else theirs)
    for mine, theirs in zip(grads[5:], exact[5:], strict=True):
        # a number shared by all neurons is a sum over samples, steps and neurons, whose parts cancel: 2e-4 of it
        scale, each = theirs.abs().max().item() + 1e-3, len(theirs) == size > 1
        assert_close(mine, theirs, scale=scale if each else 10 * scale + batch * size * 0.05)


@pytest.mark.long
@every_pair(**NEURONS, size=(300, 1200, 5000), batch=(1, 7, 64, 256), held=(False, True), threads=(1, 2))
def test_a_loop_of_many_neurons_is_that_of_float64(model, reset, surrogate, size, batch, held, threads):
    """All numbers of the forward pass are multiples of small powers of 2, so both round none of them, and no spike
    depends on rounding."""
    draw = seeded(size + batch)

    def coarse(values, of):
        return (values * of).round() / of

    mask, values = weights(size, size, 1, 30 / size, scale=0.3)
    inputs, of_inputs = weights(size, 20, 1, 0.3, seed=5)
    x = coarse(torch.randn((batch, 20) if held else (4, batch, 20), generator=draw), 4)
    spans = [(0.25, 1.0) if name == "threshold" else (0.25, 0.5) for name in MODELS[model].parameters]
    parameters = [least + span * torch.randint(3, (size,), generator=draw) / 2 for span, least in spans]
    neurons = Neurons(model, tuple(parameters), reset, surrogate, 2.0)
    pairs = (mask, coarse(values, 16)), (inputs, coarse(of_inputs, 16))
    check_loop(x, *pairs, neurons, None, None, 4 if held else None, threads)


def losses(x, model: str, parameters, size: int, chunk=None, parts: int | None = None, density=(0.1, 0.3), delay=1):
    """Counts and gradients of a recurrent layer, in one run, in chunks or in parts."""
    mask, values = weights(size, size, 1, density[0], scale=density[1])
    inputs, of_inputs = weights(size, 20, 1, 0.4, seed=5)
    leaves = [each.clone().requires_grad_() for each in (values, of_inputs)]
    population = Neurons(model, tuple(torch.tensor([each]) for each in parameters))
    joined = Connection("linear", leaves[0], mask, 0, Delay(delay, delay))
    layer = Population(population, (Connection("linear", leaves[1], inputs, -1), joined))
    total, state, sent = 0, None, None
    for part in x.split(parts or len(x)):
        activity = g2g_stack(part, [layer._replace(state=state, sent=sent)], None, backend="cpu", chunk=chunk)
        total, (state,) = total + activity.counts, activity.states
        sent = activity.sent[0].dense() if activity.sent and activity.sent[0] else None
    (total * torch.arange(float(size))).sum().backward()
    return [total.detach(), *[each.grad for each in leaves]]


@pytest.mark.parametrize("delay", [1, 4])
def test_results_are_the_same_for_any_number_of_threads(delay):
    of = torch.rand(12, 3, 20, generator=seeded(1)), "lif", (0.9, 1.0), 300
    expected = losses(*of, delay=delay)
    for threads in (1, 3):
        with pytorch_threads(threads):
            torch.testing.assert_close(losses(*of, delay=delay), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "parameters", "delay"),
    [
        ("adlif", (0.9, 0.8, 0.1, 0.2, 0.9), 1),
        ("cubalif", (0.8, 0.7, 0.5, 2.0, 0.0, 0.6), 1),
        ("refractory_adlif", (0.9, 0.8, 0.1, 0.2, 3.0, 0.9), 1),  # whose states show no spikes
        ("lif", (0.9, 0.8), 5),
        ("cubalif", (0.8, 0.7, 0.5, 2.0, 0.0, 0.6), 2),
    ],
)
def test_a_run_in_parts_and_in_chunks_is_the_whole_run(monkeypatch, model, parameters, delay):
    packed = []
    for name in ("WIDE", "LARGE", "SPARSE"):  # spikes between chunks are kept as sparse copies
        monkeypatch.setattr(chunks, name, 1)
    monkeypatch.setattr(chunks, "_unpacked", lambda kept, of=chunks._unpacked: packed.append(kept) or of(kept))
    of = torch.randn(10, 4, 20, generator=seeded(1)), model, parameters, 90
    counts, *grads = losses(*of, density=(0.2, 0.4), delay=delay)
    for chunk, parts in ((3, 10), (None, 4), (1, 10)):
        found, *of_parts = losses(*of, chunk, parts, density=(0.2, 0.4), delay=delay)
        assert torch.equal(found, counts)
        for mine, theirs in zip(of_parts, grads, strict=True):
            assert_close(mine, theirs.double())
    assert any(isinstance(each, torch.Tensor) for each in packed)


@pytest.mark.parametrize("truncate", [None, 50])
def test_the_graph_of_chunks_keeps_no_dense_spikes(monkeypatch, truncate):
    for name in ("WIDE", "LARGE", "SPARSE"):
        monkeypatch.setattr(chunks, name, 1)
    each, size, batch, chunk, held = torch.arange(4096), 4096, 4, 50, []
    joined = Projection.from_edges("a", "a", each, each.flip(0), 0.1, 2, sizes=(size, size))
    inputs = Projection.from_edges("input", "a", [0], [0], 1.0, sizes=(1, size))
    net = SpikingNetwork({"a": LIF(size)}, [*inputs, *joined], "a")

    def dense_bytes() -> int:  # a function, whose lists do not outlive it
        alive = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.layout == torch.strided]
        storages = [each.untyped_storage() for each in alive]
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())

    for steps in (2 * chunk, 6 * chunk):
        activity = net.simulate(torch.ones(steps, batch, 1), chunk=chunk, truncate=truncate)
        assert activity.counts.requires_grad
        held.append(dense_bytes())
    assert held[1] - held[0] < 4 * 4 * chunk * batch * size / 2  # of four chunks more, half their dense spikes


# --- by events --------------------------------------------------------------------------------------------------

NETWORKS = {
    "model": MODELS,
    "reset": RESETS,
    "delay": ("none", "one", "per neuron"),
    "onto": (None, "membrane"),
    "batch": (1, 3),
    "inputs": ("spikes", "floats", "held"),
    "threads": (1, 2),
    "neurons": ("all", "reached", ""),
    "dtype": (torch.float32, torch.float64),
    "in_a_range": RANGES,
    **dict.fromkeys(("state", "dropped", "per_neuron", "bias"), (False, True)),
}
#: of the parameters of neurons, from the least to the most; the others are from 0.3 to 0.9
SPANS = {"threshold": (0.7, 1.0), "refractory": (0.0, 4.0), "reset_current": (0.0, 2.0)}
INPUTS, SIZES_OF_BOTH, STEPS = 9, (70, 33), 40


def network(
    model, reset, delay, onto, batch, inputs, dtype, state=False, dropped=False, per_neuron=False, bias=False,
    surrogate="triangle", alpha=2.0,
):  # fmt: skip
    """The arguments of ``g2g_stack`` for two populations that reach one another, the second of them of cubalif."""
    draw = seeded(batch)

    def joined(source, target, kind, density, scale, port=None):
        size = INPUTS if source < 0 else SIZES_OF_BOTH[source]
        mask, values = weights(SIZES_OF_BOTH[target], size, 1, density, 7 * source + target, scale)
        each = Delay(1, 6, torch.randint(1, 7, (size,), generator=draw))
        of_target = 0.1 * torch.randn(SIZES_OF_BOTH[target], generator=draw).to(dtype) if bias and source < 0 else None
        late = {"none": None, "one": Delay(3, 3), "per neuron": each}[kind]
        return Connection("linear", values.to(dtype), mask, source, late, of_target, None, port)

    def population(size, model, *connections):
        parameters = []
        for name in MODELS[model].parameters:
            least, most = SPANS.get(name, (0.3, 0.9))
            drawn = least + (most - least) * torch.rand(size if per_neuron else 1, generator=draw, dtype=torch.float64)
            parameters.append((drawn.floor() if name in ("refractory", "reset_current") else drawn).to(dtype))
        return Population(
            Neurons(model, tuple(parameters), reset, surrogate, alpha),
            connections,
            torch.rand(batch, size, generator=draw) < 0.2 if dropped else None,
            1.2 * torch.rand(len(MODELS[model].states), batch, size, generator=draw).to(dtype) if state else None,
            (torch.rand(6, batch, size, generator=draw) < 0.2).to(dtype) if state else None,
        )

    of_inputs, back = joined(-1, 0, "none", 0.6, 1.0, onto), joined(1, 0, "per neuron", 0.3, 0.8, onto)
    first = population(SIZES_OF_BOTH[0], model, of_inputs, joined(0, 0, "one", 0.1, 0.8), back)
    forward, late_inputs = joined(0, 1, delay, 0.3, 0.8), joined(-1, 1, delay, 0.3, 0.5, "membrane")
    second = population(SIZES_OF_BOTH[1], "cubalif", forward, late_inputs)
    x = torch.randn((batch, INPUTS) if inputs == "held" else (STEPS, batch, INPUTS), generator=draw).to(dtype)
    x = (x > 1).to(dtype) if inputs == "spikes" else x
    before = (torch.rand(6, batch, INPUTS, generator=draw) < 0.2).to(dtype) if state and delay != "none" else None
    return x, (first, second), STEPS if inputs == "held" else None, before


def in_float64(x, populations, steps, before):
    """A run of the reference."""
    tensors, form = opened((x, populations, before))
    exact = built(form, [exactly(each) for each in tensors])
    return g2g_stack(exact[0], exact[1], steps, "torch", before=exact[2])


def exactly(tensor):
    return tensor.double().nan_to_num() if tensor.is_floating_point() else tensor


def assert_same_run(found, expected, close):
    for mine, theirs in zip(found.spikes, expected.spikes, strict=True):
        assert torch.equal(mine.dense().double(), theirs.dense().double())
        assert torch.equal(mine.events(), theirs.events())
        assert len(mine.events())
    shown = [activity.membranes or () for activity in (found, expected)]
    numbers = [(run.counts, *run.rates, *run.states, *shown[place]) for place, run in enumerate((found, expected))]
    for mine, theirs in zip(*numbers, strict=True):
        assert (mine.double() - theirs).abs().max() <= close * (1 + theirs.abs().max())
    for mine, theirs in zip(found.sent, expected.sent, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine.dense().double(), theirs.dense().double())


@every_pair(**NETWORKS, membranes=(False, True, (3, 0, 3)))
def test_networks_by_events_are_those_of_float64(
    monkeypatch, model, reset, delay, onto, batch, inputs, threads, neurons, dtype, in_a_range, state, dropped,
    per_neuron, bias, membranes,
):  # fmt: skip
    monkeypatch.setenv("G2G_CPU_NEURONS", neurons)
    cut_lists(monkeypatch, in_a_range)
    of = model, reset, delay, onto, batch, inputs, dtype, state, dropped, per_neuron, bias
    x, unobserved, steps, before = network(*of)
    populations = tuple([each._replace(membranes=membranes) for each in unobserved])
    assert explain(x, populations, steps, "cpu", before=before).way.name == "cpu events"
    with pytorch_threads(threads):
        found = g2g_stack(x, populations, steps, "cpu", before=before)
    assert found.spikes[0].dense().dtype == found.counts.dtype == found.states[0].dtype == dtype
    assert_same_run(found, in_float64(x, populations, steps, before), CLOSE if dtype == torch.float32 else 1e-12)
    assert (found.membranes is None) == (membranes is False)
    for mine, theirs in zip(found.states, g2g_stack(x, unobserved, steps, "cpu", before=before).states, strict=True):
        assert torch.equal(mine, theirs)  # watching changes no bit


def with_gradients(x, populations, steps, before, backend, **options):
    """A run, and the gradients of a loss on all that it gives, by all tensors of its call that may have one."""
    tensors, form = opened((x, populations, before))
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in tensors]
    x, populations, before = built(form, leaves)
    if backend == "cpu":
        chosen = explain(x, populations, steps, backend, before=before)
        assert chosen.way.name == "cpu events"
    activity = g2g_stack(x, populations, steps, backend, before=before, **options)
    draw, loss = seeded(5), 0
    sent = [each.dense() for each in activity.sent if each is not None]
    for given in (activity.counts, *activity.rates, *activity.states, *sent):
        factor = 30 if given.dim() == 1 else 1  # of rates, which are small
        loss = loss + (factor * given * torch.randn(given.shape, generator=draw, dtype=torch.float64)).sum()
    wanted = [each for each in leaves if each.requires_grad]
    return activity, torch.autograd.grad(loss, wanted, allow_unused=True)


GRADIENTS = {
    **{name: values for name, values in NETWORKS.items() if name != "model"},
    "truncate": (None, 7, 13, 100),
    "surrogate": [name for name, surrogate in SURROGATES.items() if surrogate.compact],
    "alpha": (1.0, 2.0, 4.0),
}


def compare_gradients(threads, neurons, truncate, dtype, in_a_range, **of):
    x, populations, steps, before = network("cubalif", dtype=dtype, **of)
    with pytest.MonkeyPatch.context() as patch, pytorch_threads(threads):
        patch.setenv("G2G_CPU_NEURONS", neurons)
        cut_lists(patch, in_a_range)
        found, mine = with_gradients(x, populations, steps, before, "cpu", truncate=truncate)
    tensors, form = opened((x, populations, before))
    exact = built(form, [exactly(each) for each in tensors])
    expected, theirs = with_gradients(exact[0], exact[1], steps, exact[2], "torch", truncate=truncate)
    for one, other in zip(found.spikes, expected.spikes, strict=True):
        assert torch.equal(one.dense().double(), other.dense())
    for one, other in zip(mine, theirs, strict=True):
        other = torch.zeros_like(one) if other is None else other
        # one number for all neurons sums terms of both signs
        close = 1e-11 if dtype == torch.float64 else 1e-4 if other.numel() > 1 else 3e-3
        assert (one.double() - other).abs().max() <= close * (1e-3 + other.abs().max())


@every_pair(**GRADIENTS)
def test_gradients_by_events_are_those_of_float64(
    reset, delay, onto, batch, inputs, threads, neurons, dtype, in_a_range, state, dropped, per_neuron, bias, truncate,
    surrogate, alpha,
):  # fmt: skip
    compare_gradients(**locals())


@pytest.mark.long
def test_gradients_of_300_random_networks_by_events_are_those_of_float64():
    draw = random.Random(1)
    for _ in range(300):
        compare_gradients(**{name: draw.choice(tuple(values)) for name, values in GRADIENTS.items()})


def test_a_gradient_by_events_that_is_not_finite_is_an_error_that_names_it():
    x, populations, *_ = network("cubalif", "zero", "one", None, 1, "spikes", torch.float32)
    first, *_ = populations[0].connections
    first.values.requires_grad_()
    with pytest.raises(
        FloatingPointError, match=r"^the gradient of values of a connection to population 0 is not finite"
    ):
        (g2g_stack(x, populations, backend="cpu").counts * 3e38).sum().backward()


def test_gradients_by_events_have_gradients_of_their_own_by_plain_operations():
    x, populations, *_ = network("cubalif", "zero", "one", None, 1, "spikes", torch.float64)
    values = [each.values.requires_grad_() for each in populations[0].connections]
    for truncate, inputs in ((None, x), (7, x), (None, x.to_sparse()), (7, x.to_sparse())):
        second = {}
        for backend in ("cpu", "torch"):
            counts = g2g_stack(inputs, populations, backend=backend, truncate=truncate).counts
            first = torch.autograd.grad(counts.square().sum(), values, create_graph=True)
            second[backend] = first + torch.autograd.grad(sum(each.square().sum() for each in first), values)
        for one, other in zip(second["cpu"], second["torch"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


SPARSE = NETWORKS | {"inputs": ("spikes", "floats"), "alone": (False, True), "truncate": (None, 7), "chunk": (None, 13)}


@every_pair(**SPARSE)
def test_sparse_inputs_by_events_give_every_bit_that_dense_ones_give(
    monkeypatch, model, reset, delay, onto, batch, inputs, threads, neurons, dtype, in_a_range, state, dropped,
    per_neuron, bias, alone, truncate, chunk,
):  # fmt: skip
    monkeypatch.setenv("G2G_CPU_NEURONS", neurons)
    cut_lists(monkeypatch, in_a_range)
    of = model, reset, delay, onto, batch, inputs, dtype, state, dropped, per_neuron, bias
    x, (first, second), _, before = network(*of)
    if alone:  # only one connection receives the inputs
        first = first._replace(connections=first.connections[1:])
    populations = first, second._replace(membranes=() if model == "cubalif" else (3, 0))
    weights = [each.values for of in populations for each in of.connections]
    x = x.masked_fill(torch.rand(x.shape, generator=seeded(9)) < 0.5, 0)
    places = (x != 0).logical_or(torch.rand(x.shape, generator=seeded(8)) < 0.05).nonzero().T  # of some the number is 0
    halves = x[tuple(places)] / 2
    uncoalesced = torch.cat([places.flip(1), places], 1), torch.cat([halves.flip(0), halves])
    made_dense, slice_of = [], chunks.SparseSteps.__getitem__
    monkeypatch.setattr(
        chunks.SparseSteps, "__getitem__", lambda *of: (made_dense.append(slice_of(*of)), made_dense[-1])[1]
    )
    runs, operations = [], []
    for given in (x, torch.sparse_coo_tensor(*uncoalesced, x.shape)):
        with pytorch_threads(threads), torch.set_grad_enabled(model == "cubalif"):
            for each in weights:
                each.requires_grad_(model == "cubalif")
            found = g2g_stack(given, populations, None, "cpu", chunk=chunk, before=before, truncate=truncate)
            grads = torch.autograd.grad(found.counts.sum(), weights) if model == "cubalif" else ()
        sent = [each.dense() for each in found.sent if each is not None]
        spikes = [each.events() for each in found.spikes]
        shown = [each for each in found.membranes or () if each is not None]
        runs.append([found.counts, *found.rates, *found.states, *sent, *spikes, *shown, *grads])
        operations.append(found.synaptic_operations() if not (truncate or chunk) else None)
    assert all([torch.equal(one, other) for one, other in zip(*runs, strict=True)])
    assert operations[0] == operations[1]
    if truncate or not chunk:
        assert max([len(each) for each in made_dense]) <= 6  # the longest delay


@pytest.mark.parametrize("neurons", ["all", "reached"])
def test_a_run_by_events_in_parts_and_in_chunks_is_the_whole_run(monkeypatch, neurons):
    monkeypatch.setenv("G2G_CPU_NEURONS", neurons)
    x, populations, *_ = network("cubalif", "zero", "per neuron", "membrane", 2, "spikes", torch.float64)
    whole = g2g_stack(x, populations, backend="cpu")
    assert_same_run(whole, in_float64(x, populations, None, None), 1e-12)
    chunked = g2g_stack(x, populations, backend="cpu", chunk=3)
    assert torch.equal(chunked.counts, whole.counts)
    of_all = with_gradients(x, populations, None, None, "cpu")[1]
    for one, other in zip(with_gradients(x, populations, None, None, "cpu", chunk=7)[1], of_all, strict=True):
        assert one is other is None or (one - other).abs().max() <= 1e-12 * (1 + other.abs().max())
    before, counts = None, 0
    for part in x.split(17):  # shorter and longer than delays
        activity = g2g_stack(part, populations, backend="cpu", before=before)
        *sent, before = [each and each.dense() for each in activity.sent]
        after = zip(populations, activity.states, sent, strict=True)
        populations = tuple([each._replace(state=state, sent=of_each) for each, state, of_each in after])
        counts = counts + activity.counts
    assert torch.equal(counts, whole.counts)
    assert (populations[0].state - whole.states[0]).abs().max() < 1e-12


def test_both_ways_to_run_neurons_change_into_one_another(monkeypatch):
    """Bursts of input over 700 steps; a change is made after 64 steps that would have been cheaper the other way."""
    monkeypatch.setattr(library, "VISIT_COST", 0.02)  # so that it pays for so few neurons
    size, draw = 3000, seeded(2)
    mask, values = weights(size, size, 1, 20 / size, scale=0.2)
    of_inputs, cue = weights(size, 20, 1, 0.3, scale=2.0)
    parameters = torch.tensor([0.9, 0.95, 0.05, 5.0, 1.0, 1.0]).double()
    neurons = Neurons("cubalif", tuple(parameters[:, None]), "zero")
    own = Connection("linear", cue.double(), of_inputs, -1), Connection("linear", values.double(), mask, 0, Delay(4, 4))
    x = (torch.rand(700, 1, 20, generator=draw) < 0.3).double()
    x[100:500] = 0
    runs = []
    for cost in (0.0, 0.02, 0.05, float("inf")):
        monkeypatch.setattr(library, "VISIT_COST", cost)
        runs.append(g2g_stack(x, [Population(neurons, own)], backend="cpu"))
    for each in runs[1:]:
        assert_same_run(each, runs[0], 1e-10)


def test_lists_and_ordered_weights_are_kept_until_they_change(monkeypatch):
    x, populations, steps, _ = network("lif", "zero", "one", None, 1, "spikes", torch.float32)
    made = []
    monkeypatch.setattr(plans, "Plan", lambda *args, plan=plans.Plan: (made.append(args), plan(*args))[1])

    def agrees():
        activity = g2g_stack(x, populations, steps, "cpu")
        assert_same_run(activity, in_float64(x, populations, steps, None), CLOSE)
        return activity.counts

    first = agrees()
    built_then = len(made)
    of_both = [each for population in populations for each in population.connections]
    ordered = [plans.lists_for(each.mask.tensors(), each.values, "cols").ordered(each.values) for each in of_both]
    assert torch.equal(agrees(), first)
    for each, then in zip(of_both, ordered, strict=True):
        assert plans.lists_for(each.mask.tensors(), each.values, "cols").ordered(each.values) is then
    assert len(made) == built_then
    for each in of_both:
        each.values.data.mul_(1.5)  # which no version counts
    assert not torch.equal(agrees(), first)
    mask = of_both[0].mask
    absent = (~mask.present().flatten()).nonzero()[:3, 0]
    mask.relabel_(torch.arange(3), absent // mask.grid[1], absent % mask.grid[1])
    agrees()
    assert len(made) == built_then + 1


def test_calls_that_events_do_not_serve_are_refused_by_name(monkeypatch):
    x, populations, *_ = network("lif", "zero", "one", None, 1, "spikes", torch.float32)
    populations[0].connections[0].values.requires_grad_()
    reasons = explain(x, populations).reasons
    assert reasons["cpu events"].startswith("computes no gradients of the model 'lif' (population 0); call under")
    x, of_cubalif, *_ = network("cubalif", "zero", "per neuron", None, 1, "spikes", torch.float32, surrogate="atan")
    of_cubalif[0].connections[0].values.requires_grad_()
    reason = explain(x, of_cubalif).reasons["cpu events"]
    assert reason.startswith(
        "computes no gradients of the surrogate 'atan', which is not 0 far from the threshold (pop"
    )
    x, watched, *_ = network("cubalif", "zero", "one", None, 1, "spikes", torch.float32)
    watched[0].connections[0].values.requires_grad_()
    watched = populations[0], watched[1]._replace(membranes=(3,))
    assert explain(x, watched).reasons["cpu events"].startswith("gives membranes no gradient; call under torch.no_grad")
    with torch.no_grad():
        assert explain(x, populations).way.name == explain(x, watched).way.name == "cpu events"
        monkeypatch.setenv("G2G_CPU_NEURONS", "some")
        with pytest.raises(ValueError, match="G2G_CPU_NEURONS='some' is unknown; choose one of reached, all"):
            g2g_stack(x, populations)
    # the backward pass of a chunk needs the spikes of its forward pass, so both run the same way
    g2g_stack(x, populations, chunk=7).counts.sum().backward()


def call() -> recurrent_lists.LoopCall:
    mask, values = weights(12, 12, 1, 0.3)
    current, state = torch.randn(2, 5, 2, 12, generator=seeded(1)), torch.zeros(2, 2, 12)
    parameters = torch.tensor([0.8], requires_grad=True), torch.tensor([0.8]), torch.tensor([1.0])
    sent, dropped = torch.ones(2, 2, 12), torch.zeros(2, 12, dtype=torch.bool)
    for each in (current, values, state):
        each.requires_grad_()
    own = Connection("linear", values, mask.tensors(), 0, Delay(2, 2))
    population = Population(Neurons("synaptic", parameters), (own,), dropped, state, sent)
    return recurrent_lists.LoopCall(current[0], population, 5, current[1])


def test_a_current_that_is_held_and_one_onto_the_membrane_that_is_not_may_meet():
    given, found = call(), []
    for current in (given.current[0], given.current[:1].expand(5, 2, 12)):
        for to_membrane in (given.to_membrane, given.to_membrane[0]):
            each = given._replace(current=current.contiguous(), to_membrane=to_membrane.contiguous())
            spikes, last, *_ = recurrent_lists.FORWARD(each)
            grads = torch.autograd.grad((spikes * last[0]).sum() + last.square().sum(), [current, to_membrane])
            grads = [grad if grad.dim() == 2 else grad.sum(0) for grad in grads]
            found.append([spikes.detach(), last.detach(), *grads])
    for one, other in ((0, 2), (1, 3)):
        torch.testing.assert_close(found[one], found[other], rtol=1e-5, atol=1e-5)


def test_operators_have_second_derivatives():
    given, found = call(), []
    inputs = given.current, given.to_membrane
    for summed in (False, True):
        spikes, last, *_ = recurrent_lists.FORWARD(given._replace(summed=summed))
        assert len(spikes) == (1 if summed else 5)
        loss = spikes.sum(0).square().sum() + last.square().sum()
        firsts = torch.autograd.grad(loss, inputs, create_graph=True)
        seconds = [torch.autograd.grad(each.sum(), given.recurrent.values, retain_graph=True)[0] for each in firsts]
        assert all(each.abs().sum() > 0 for each in seconds)
        found.append([spikes.sum(0), *firsts, *seconds])
    torch.testing.assert_close(*found)


def test_a_mask_that_changes_in_place_has_new_lists():
    mask, values = weights(20, 30, 1, 0.1)
    x = torch.rand(4, 30, generator=seeded(1))
    before = g2g_linear(x, values, mask, backend="cpu")
    absent = (~mask.present().flatten()).nonzero()[:1, 0]
    mask.relabel_(torch.tensor([0]), absent // 30, absent % 30)
    after = g2g_linear(x, values, mask, backend="cpu")
    assert_close(after, (x.double() @ mask.unpack(values.double()).T))
    assert not torch.equal(before, after)


def test_lists_are_chosen_where_tiles_would_be_mostly_empty(monkeypatch):
    monkeypatch.setattr(library, "LIST_COST", 1.0)
    few, many = (10_000, 1, 1), (1_000_000, 1, 1)
    assert plans.in_lists((2048, 2048), few, "linear")
    assert not plans.in_lists((2048, 2048), many, "linear")
    assert not plans.in_lists((2048, 2048), few, "stack")  # a fused pass over its 1,024 tiles is faster
    assert plans.in_lists((65536, 65536), many, "stack")
    assert plans.in_lists((8192, 8192), few, "recurrent")
    assert not plans.in_lists((512, 512), (100, 16, 16), "linear")  # units of 16 fill a sixteenth of a tile
    assert not plans.in_lists((1, 256), (256, 10, 1), "linear")  # ten outputs, all joined
    monkeypatch.setattr(library, "LIST_COST", float("inf"))
    assert not plans.in_lists((65536, 65536), few, "recurrent")


def test_a_wide_layer_takes_memory_by_its_weights_alone(monkeypatch):
    monkeypatch.setattr(library, "LIST_COST", 1.0)
    monkeypatch.setattr(workspace, "poison", False)
    size, taken = 80_000, []
    draw = torch.Generator().manual_seed(0)
    mask = BlockMask.sample(GroupLayout(size), GroupLayout(size), density=4e-5, block_size=1, generator=draw)
    assert abs(mask.num_units - 256_000) < 1000
    for name, make in (("bytes", workspace.bytes), ("borrow", workspace.borrow)):
        monkeypatch.setattr(workspace, name, lambda count, make=make: (taken.append(count), make(count))[1])
    values = torch.full((mask.num_units, 1, 1), 0.5, requires_grad=True)
    each = torch.arange(size)
    inputs = BlockMask(GroupLayout(size, 1), GroupLayout(size, 1), each, each, block_size=1)
    population = Neurons("lif", (torch.tensor([0.9]), torch.tensor([1.0])))
    layer = chained(0, torch.ones(size, 1, 1), inputs, None, population, (values, mask))
    g2g_stack(torch.rand(2, size, generator=draw), [layer], 4, backend="cpu").counts.sum().backward()
    assert values.grad.abs().sum() > 0
    assert max(taken) < 50e6  # a bit for each of the N² weights would be 800 MB
    assert len(mask.to_string().splitlines()) == 64
    assert mask._repr_html_()
