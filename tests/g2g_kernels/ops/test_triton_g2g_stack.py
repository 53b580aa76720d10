"""The stack of layers in Triton, in pairs of kernels and fused; without a GPU in the interpreter, on the CPU."""

import collections
import importlib
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import stack_cases
import torch
from helpers import ErrorRatios, MaskCase, chained, changed, device_of, lif_layer, rms, seeded
from stack_cases import MIXER, SIZES, STACKS, Stack, chain, clear_of_thresholds, clear_stack, loss, results, rounded

from g2g_kernels import BackendError, BlockMask, GroupLayout, Neurons, Population, g2g_stack, lif
from g2g_kernels.ops.g2g_stack.population import Call
from g2g_kernels.ops.neurons import MODELS, RESETS
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.ops.record import opened
from g2g_kernels.triton import runtime
from g2gnet import G2GNet

if runtime.unavailable() is None:
    from g2g_kernels.ops.g2g_stack import triton

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

#: in order and whole, which is what can be fused
IN_ORDER = (*chain((21, 32), 2, 16, "index index"), *chain((32, 48, 32), 1, 16, "index index"))
STACKS_OF_UNITS = [chain(SIZES, 2, 16, *MIXER), STACKS["one unit a group"], IN_ORDER]


def stacks_of(way: str) -> list[tuple[MaskCase, ...]]:
    return [IN_ORDER] if way == "fused" else STACKS_OF_UNITS


T = 9
#: steps of a test of something else: the first layer's input is held, that of the others varies
SHORT = 3
#: stacks that differ by their seed alone: errors of one number (one β a layer) scatter, and so does the mean of four
FEW = 8


@pytest.fixture(autouse=True)
def pairs() -> Iterator[None]:
    """Runs products by units, and every layer as a pair of kernels unless told otherwise."""
    with runtime.assuming(fused=False, dense=False):
        yield


@pytest.fixture(params=["pair", "fused"])
def way(request) -> Iterator[str]:
    """Runs what can be fused as a pair of kernels, or fused into one."""
    with runtime.assuming(fused=request.param == "fused"):
        yield request.param


def compare(ratios: ErrorRatios, stack: Stack, dtype: torch.dtype = torch.float32, **options) -> None:
    """Equal spikes; the errors of everything else beside those of plain PyTorch."""
    exact = stack.run(torch.float64, "torch", **options)
    plain = stack.run(dtype, "torch", **options)
    actual = stack.run(dtype, "triton", **options)
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        if name.startswith(("spikes", "counts")):
            assert torch.equal(actual[name].double(), expected), name
        else:
            # rates are float32 whatever the dtype
            of = torch.float32 if name.startswith("rates") else dtype
            ratios.add(name, actual[name].to(of), plain[name].to(of), expected)


@pytest.mark.ci
def test_errors_are_at_most_1_5_times_those_of_plain_pytorch():
    """All surrogates with two resets each, once with a held input; resets and masks take turns."""
    ratios = ErrorRatios()
    masks, resets = itertools.cycle(STACKS_OF_UNITS), itertools.cycle(RESETS)
    for steps, surrogate in itertools.product((None, T), SURROGATES):
        reset = next(resets)
        compare(ratios, clear_stack(next(masks), steps, reset), reset=reset, surrogate=surrogate)
    ratios.check(cases=2 * len(SURROGATES))


def first_alike(draws: Iterator[Stack]) -> tuple[Stack, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The first stack with the same spikes in float64 and float32, and its results in both."""
    for stack in draws:
        exact, plain = (stack.run(dtype, "torch") for dtype in (torch.float64, torch.float32))
        if all(torch.equal(exact[f"spikes{k}"], plain[f"spikes{k}"].double()) for k in range(3)):
            break
    return stack, exact, plain


def exact_in(dtype: torch.dtype, cases, steps: int | None, dropout: float = 0.0) -> Stack:
    draws = (rounded(Stack(cases, steps, dropout=dropout, seed=1000 * k), dtype) for k in range(20))
    return next(stack for stack in draws if clear_of_thresholds(stack, "subtract"))


#: the interpreter's bfloat16 arithmetic is wrong
HALF = [torch.float16] + ([torch.bfloat16] if not runtime.interpreted() else [])
every_half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.ci
@every_half
@pytest.mark.parametrize(
    ("steps", "dropout"), [(None, 0.0), (T, 0.0), (None, 0.3)], ids=["varying", "held", "dropped neurons"]
)
def test_16_bits(way, steps, dropout, dtype):
    ratios = ErrorRatios()
    for cases in stacks_of(way):
        compare(ratios, exact_in(dtype, cases, steps, dropout), dtype)
    ratios.check(cases=len(stacks_of(way)))


def beside_plain(dtype: torch.dtype, run: Callable[[torch.dtype, str], dict]) -> list[dict[str, torch.Tensor]]:
    """What a run gives in float64, and under autocast in plain PyTorch and in Triton."""
    found = [run(torch.float64, "torch")]
    for backend in ("torch", "triton"):
        with torch.autocast(device_of(backend), dtype):
            found.append(run(torch.float32, backend))
    return found


@every_half
def test_autocast(way, dtype):
    """float32 parameters get float32 gradients; counts and rates are float32."""
    ratios = ErrorRatios()
    for cases, steps in itertools.product(stacks_of(way), (None, T)):
        exact, plain, found = beside_plain(dtype, exact_in(dtype, cases, steps).run)
        for name, actual in found.items():
            if name.startswith(("spikes", "counts")):
                assert torch.equal(actual.double(), exact[name]), name
            else:
                ratios.add(name, actual, plain[name], exact[name])
    ratios.check(cases=2 * len(stacks_of(way)))


def between(stack: Stack) -> Stack:
    """The stack with thresholds half-way between 64ths: of many currents, 16ths in bfloat16, some would be equal."""
    for name, tensor in stack.tensors.items():
        if name.startswith("threshold"):
            tensor.copy_(((tensor * 64).floor() + 0.5) / 64)
    return stack


@pytest.mark.ci
@every_half
def test_a_fused_layer_with_every_reset_and_surrogate(dtype):
    """Of segments that are full or not, and of more samples than a tile."""
    ratios = ErrorRatios()
    sizes, resets = itertools.cycle([(2, 5), (3, 67), (11, 3)]), itertools.cycle(RESETS)
    with runtime.assuming(fused=True):
        for surrogate in [*SURROGATES, *SURROGATES]:
            (steps, batch), reset = next(sizes), next(resets)
            draws = (between(rounded(Stack(IN_ORDER, steps, seed=1000 * k, batch=batch), dtype)) for k in range(50))
            stack = next(stack for stack in draws if clear_of_thresholds(stack, reset))
            compare(ratios, stack, dtype, reset=reset, surrogate=surrogate)
    ratios.check(cases=2 * len(SURROGATES))


@pytest.mark.parametrize(
    ("surrogate", "alpha", "steps", "batch"),
    [("triangle", 2e5, None, 5), ("boxcar", 0.01, None, 5), ("triangle", 2.0, 1, 3)],
)
def test_from_no_neuron_that_passes_a_gradient_on_to_all(surrogate, alpha, steps, batch):
    stack_cases.check_compact("triton", stack_cases.stacks_on("triton")["ragged index"], surrogate, alpha, steps, batch)


#: units of 64, groups of 98 inputs and 2 outputs: what the kernels of the default network are compiled for
DEFAULT = chain((196, 128, 128, 4), 2, 64, "index index")


@pytest.mark.passes
@pytest.mark.skipif(runtime.interpreted(), reason="the interpreter's bfloat16 arithmetic is wrong")
def test_the_kernels_of_a_default_step(way):
    """Two segments of ten steps; tiles of samples that are not full."""
    draws = (rounded(Stack(DEFAULT, 20, per_neuron=False, seed=k, batch=48), torch.bfloat16) for k in range(20))
    exact, *found = beside_plain(torch.bfloat16, first_alike(draws)[0].run)
    for name, expected in exact.items():
        plain, actual = (each[name] for each in found)
        if name.startswith(("spikes", "counts")):
            assert torch.equal(actual.double(), expected), name
            assert expected.any(), name
        else:
            # bfloat16 rounding; a single number's error scatters
            assert rms(actual - expected) <= max(0.01 * rms(expected), 1.5 * rms(plain - expected)), name


@pytest.mark.parametrize("steps", [1, 11, 20])
def test_numbers_of_steps(steps):
    """One step, whole segments and more, in one layer whose input is held and two whose is not."""
    draws = (Stack(STACKS_OF_UNITS[0], steps, seed=1000 * k, batch=3) for k in range(20))
    stack, exact, plain = first_alike(draws)
    actual = stack.run(torch.float32, "triton")
    for name, expected in exact.items():
        if name.startswith(("spikes", "counts")):
            assert torch.equal(actual[name].double(), expected), name
        elif rms(expected):
            # float32 rounding through three layers and up to twenty steps
            assert rms(actual[name] - expected) <= max(1e-4, 3 * rms(plain[name] - expected)) * rms(expected), name


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        pytest.param(SHORT, {"batch": 67}, id="more samples than a tile has", marks=pytest.mark.ci),
        pytest.param(
            T, {"per_neuron": False, "bias": False}, id="one beta and threshold and no bias", marks=pytest.mark.ci
        ),
        pytest.param(SHORT, {"dropout": 0.3}, id="dropped neurons"),
    ],
)
def test_other_stacks(steps, options):
    """A tile of a product has 128 samples, one of a fused layer 64."""
    ratios = ErrorRatios()
    for stack in itertools.islice(stack_cases.clear_stacks(STACKS_OF_UNITS[0], steps, **options), FEW):
        assert options.get("bias", True) == any(name.startswith("bias") for name in stack.tensors)
        compare(ratios, stack)
    ratios.check(cases=FEW)


def check_fused(dtype: torch.dtype, run: Callable[[torch.dtype, str], dict]) -> None:
    ratios = ErrorRatios()
    with runtime.assuming(fused=True):
        exact, *found = beside_plain(dtype, run)
    for name, expected in exact.items():
        plain, actual = (each[name].to(dtype) for each in found)
        if rms(expected):
            ratios.add(name, actual, plain, expected)
        else:  # of a threshold that no surrogate reaches
            assert not actual.any(), name
    ratios.check(cases=1)


@every_half
@pytest.mark.parametrize("threshold", [1e-3, 10.0, 100.0, 1e4, 1e9, -1e5, math.inf])
def test_a_fused_layer_far_from_its_threshold(dtype, threshold):
    """The gradients of last states are those of an integrator, whose membrane 16 bits of θ − U would not have."""

    def drawn(number: int) -> Stack:
        stack = rounded(Stack(IN_ORDER, None, batch=3, seed=1000 * number), dtype)
        stack.tensors["threshold1"] = torch.full((48,), threshold)
        return stack

    stack = next(stack for stack in map(drawn, range(20)) if clear_of_thresholds(stack, "none"))

    def run(of: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        leaves = stack.leaves(of, device_of(backend))
        activity = g2g_stack(leaves["x"], stack.layers(leaves, reset="none"), backend=backend)
        last = activity.states[1]
        ((last * torch.randn(last.shape, generator=seeded(3)).to(last)).sum() + activity.counts.sum()).backward()
        return {name: leaf.grad.cpu() for name, leaf in leaves.items()}

    check_fused(dtype, run)


@every_half
@pytest.mark.parametrize(("threshold", "beta", "steps"), [(10.0, 1.0, 3), (100.0, 1.0, 3), (0.0, 0.5, 50)])
def test_a_fused_layer_near_its_threshold(dtype, threshold, beta, steps):
    """σ'(U − θ) is as exact as for θ = 1: 16 bits of U would not have U − θ. A membrane above θ by less than float16's
    smallest number is reset all the same."""
    mask, draw = BlockMask.full(GroupLayout(16, 1), GroupLayout(16, 1), 16), seeded(0)
    x = torch.zeros(steps, 4, 16)
    x[:3] = torch.rand(3, 4, 16, generator=draw) > 0.5
    first, second = (torch.randn(2, 1, 16, 16, generator=draw) * 16).round() / 128
    near = threshold + torch.linspace(-1, 1, 64).view(1, 4, 16)

    def run(of: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device_of(backend), of, copy=True)

        given = {"first": 10 * first, "second": second}
        given |= {"beta": torch.tensor([beta]), "threshold": torch.tensor([threshold])}
        leaves = {name: move(each).requires_grad_() for name, each in given.items()}
        own = mask.to(leaves["first"].device)
        layers = [
            lif_layer(leaves["first"], own, None, move(torch.tensor([0.5])), move(torch.tensor([0.5]))),
            lif_layer(leaves["second"], own, None, leaves["beta"], leaves["threshold"], number=1)._replace(
                state=move(near)
            ),
        ]
        counts = g2g_stack(move(x), layers, backend=backend).counts
        (counts * torch.arange(16).to(counts)).sum().backward()
        return {name: each.grad.cpu() for name, each in leaves.items()}

    check_fused(dtype, run)


@every_half
def test_membranes_of_few_bits_are_kept_as_they_are(dtype):
    """Of quarters: one bit more or less in each would not average out. And margins are read as such by the backward
    pass even where layers would not be fused any more."""
    mask, draw = BlockMask.full(GroupLayout(16, 1), GroupLayout(16, 1), 16), seeded(1)
    x, quarters = torch.rand(4, 8, 16, generator=draw) < 0.3, torch.randint(-1, 3, (1, 16, 16), generator=draw) / 4

    def run(of: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        own = [torch.ones(1, dtype=of, device=device_of(backend), requires_grad=True) for _ in range(2)]
        ready = lif_layer(torch.eye(16)[None].to(own[0]), mask.to(own[0].device), None, 0.0, 0.5)
        layer = changed(ready, source=0, values=quarters.to(own[0]), neurons=Neurons("lif", tuple(own), "none"))
        counts = g2g_stack(x.to(own[0]), [ready, layer], backend=backend).counts
        with runtime.assuming(fused=False):
            counts.sum().backward()
        return {name: each.grad.cpu() for name, each in zip(("beta", "threshold"), own, strict=True)}

    with runtime.assuming(fused=True):
        exact, _, found = beside_plain(dtype, run)
    for name, expected in exact.items():  # sums of 512 in float32, rounded to 16 bits at last
        torch.testing.assert_close(found[name].double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_negative_threshold_lets_no_padding_fire(way):
    """Units of 15 and 14 neurons: the last place has none, but its padding is multiplied all the same."""
    masks = [BlockMask.full(GroupLayout(out, 1), GroupLayout(into, 1), 16) for out, into in ((29, 8), (16, 29))]
    device = device_of("triton")
    values = [torch.rand(len(mask.unit_row), *mask.unit_shape, generator=seeded(2)) - 0.4 for mask in masks]
    population = Neurons("lif", (torch.tensor([0.9], device=device), torch.tensor([-1.0], device=device)))
    leaves = [each.to(device).requires_grad_() for each in values]
    of = zip(range(2), leaves, masks, strict=True)
    layers = [chained(number, own, mask.to(device), None, population) for number, own, mask in of]
    x = torch.rand(4, 3, 8, generator=seeded(3)).to(device)
    expected = g2g_stack(x, layers, backend="torch").counts
    found = g2g_stack(x, layers, backend="triton").counts
    assert torch.equal(found, expected)
    (found * torch.arange(16, device=device)).sum().backward()
    padding = ~masks[1].valid().to(device)
    assert padding.any()
    assert not leaves[1].grad[padding].any()


@every_half
def test_rounding_takes_no_membrane_across_its_threshold(dtype):
    """Of two neurons the first fires and the second does not, with membranes that 16 bits round to the other side."""
    mask, small = BlockMask.full(GroupLayout(16, 1), GroupLayout(16, 1), 16), 2.0**-14
    always, near = 4 * torch.eye(16)[None], torch.zeros(1, 16, 16)
    near[0, :2, :2] = torch.tensor([[1, 2 * small], [1, -3 * small]])
    threshold = torch.ones(16)
    threshold[1] -= 2 * small

    def run(of: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        own = threshold.to(device_of(backend), of, copy=True).requires_grad_()
        beta, *values = (each.to(own) for each in (torch.zeros(1), always, near))
        layers = [lif_layer(each, mask.to(own.device), None, beta, own, number=k) for k, each in enumerate(values)]
        counts = g2g_stack(torch.ones(4, 2, 16).to(own), layers, backend=backend).counts
        counts.sum().backward()
        return {"counts": counts.detach().cpu().double(), "threshold": own.grad.cpu().double()}

    with runtime.assuming(fused=True):
        exact, _, found = beside_plain(dtype, run)
    assert exact["counts"][0, :2].tolist() == [2, 0]
    assert torch.equal(found["counts"], exact["counts"])
    torch.testing.assert_close(found["threshold"], exact["threshold"], rtol=0.01, atol=0)  # of 16 bits; R is a tenth


@pytest.mark.parametrize("used", ["counts", "rates0"])
def test_one_output_alone(used):
    stack_cases.check_one_output(STACKS_OF_UNITS[0], used, "triton")


def test_nothing_is_kept_without_gradients():
    stack = Stack(STACKS_OF_UNITS[0], T)
    with_gradients = stack.run(torch.float32, "triton")
    leaves = stack.leaves(torch.float32, device_of("triton"))
    with torch.no_grad():
        activity = g2g_stack(leaves["x"], stack.layers(leaves), T, backend="triton")
    found = results(activity.counts, activity.rates, [spikes.dense() for spikes in activity.spikes], {})
    assert all(torch.equal(tensor, with_gradients[name]) for name, tensor in found.items())


def test_results_are_reproducible(way):
    stack = Stack(STACKS_OF_UNITS[1], None)
    first, second = (stack.run(torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_on_chip_are_those_read_anew(monkeypatch):
    """In rows of units with fewer weights than fit, with as many, and with more, which read theirs in each step."""
    layout = GroupLayout(48, 1)
    rows, cols = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 2, 0])  # none in the third
    draw = seeded(3)
    layers = []
    for mask in (BlockMask.sample(layout, layout, 1.0, 1.0, 16, draw), BlockMask(layout, layout, rows, cols, 16)):
        values = torch.randn(mask.num_units, 16, 16, generator=draw).half() / 4
        beta, threshold = torch.rand(1, generator=draw), torch.ones(1)
        layers.append((values, mask, torch.rand(48, generator=draw).half(), beta.half(), threshold.half()))
    x = torch.rand(5, 67, 48, generator=draw).half()
    results = []
    for on_chip in (0, 2):
        monkeypatch.setattr(triton, "units_on_chip", lambda units, x, *_, n=on_chip: n if x == torch.uint8 else 0)
        device = device_of("triton")
        leaves = [[tensor.to(device).requires_grad_() for tensor in (v, *rest)] for v, _, *rest in layers]
        stack = [
            lif_layer(v, mask.to(device), *rest, number=number)
            for number, ((v, *rest), (_, mask, *_)) in enumerate(zip(leaves, layers, strict=True))
        ]
        with runtime.assuming(fused=True):
            activity = g2g_stack(x.to(device), stack, backend="triton")
            activity.counts.sum().backward()
        results.append([activity.counts, *(leaf.grad for layer in leaves for leaf in layer)])
    assert results[0][0].any()
    assert all(map(torch.equal, *results))


@pytest.fixture
def launched(monkeypatch) -> collections.Counter[str]:
    """Counts launches by kernel; for products, and for kernels with one, beside the dtype of what they multiply."""
    counts: collections.Counter[str] = collections.Counter()

    def launch(kernel, grid, **arguments):
        x = arguments.get("x")
        counts[f"{kernel.fn.__name__}{'' if x is None else f' of {x.dtype}'}"] += 1
        runtime.launch(kernel, grid, **arguments)

    for module in ("g2g_linear", "neurons", "g2g_stack"):
        monkeypatch.setattr(importlib.import_module(f"g2g_kernels.ops.{module}.triton"), "launch", launch)
    return counts


STEPS, BATCH = 3, 5


def joined(
    dtype: torch.dtype, device: str, model: str, kind: str, held: bool, state: bool, dropout: bool, membranes: bool
) -> tuple[torch.Tensor, list[Population]]:
    """The input and the layers of a recurrent stack, the second layer of another order of neurons in V than in W."""
    draw = seeded(3)

    def leaf(*shape: int, low: float = 0.0, scale: float = 1.0) -> torch.Tensor:
        drawn = ((low + scale * torch.rand(shape, generator=draw)) * 64).round() / 64  # exact in 16 bits
        return drawn.to(device, dtype).requires_grad_()

    x, layers, before = leaf(*(() if held else (STEPS,)), BATCH, 13, scale=2.0), [], GroupLayout(13, 2)
    for number, size in enumerate((18, 21)):
        layout = GroupLayout(size, 2, kind, seeded(5))
        other = GroupLayout(size, 2, "random", seeded(6)) if number else layout
        masks = [BlockMask.sample(layout, each, 1.0, 0.5, 8, draw) for each in (before, layout)]
        masks[1] = BlockMask.sample(other, other, 1.0, 0.5, 8, draw)
        values, of_recurrent = (leaf(mask.num_units, *mask.unit_shape, low=-0.9, scale=1.8) for mask in masks)
        own = [leaf(size if i else 1, low=0.3, scale=0.5) for i in range(len(MODELS[model].parameters))]
        states = leaf(len(MODELS[model].states), BATCH, size, low=-1.0, scale=2.0) if state else None
        dropped = (torch.rand(BATCH, size, generator=draw) < 0.3).to(device) if dropout else None
        of_weights, of_joined = (mask.to(device) for mask in masks)
        rest = {"dropped": dropped, "state": states, "membranes": membranes}
        weights = values, of_weights, leaf(size)
        layers.append(chained(number, *weights, Neurons(model, tuple(own)), (of_recurrent, of_joined), **rest))
        before = layout
    return x, layers


def results_of(backend: str, dtype: torch.dtype, spikes: bool, **options) -> tuple[list[torch.Tensor], ...]:
    """Of a loss on everything that a run gives: what it gives, and the gradients of all that it takes."""
    x, layers = joined(dtype, device_of(backend), **options)
    activity = g2g_stack(x, layers, STEPS if options["held"] else None, backend, spikes)
    trains = [train.dense() for train in activity.spikes]
    given = [activity.counts, *activity.rates, *activity.states, *(activity.membranes or ())]
    draw = seeded(9)
    weighted = [*given, *trains] if spikes else given
    parts = [(each * torch.randn(each.shape, generator=draw).to(each)).sum().double() for each in weighted]
    torch.stack(parts).sum().backward()
    leaves = [tensor for tensor in opened((x, *layers))[0] if tensor.requires_grad]
    return [each.detach().cpu() for each in [*given, *trains]], [leaf.grad.cpu() for leaf in leaves]


@pytest.mark.ci
@pytest.mark.parametrize("model", [model for model in MODELS if MODELS[model].compared is None])
@pytest.mark.parametrize(
    ("spikes", "options"),
    [
        (False, {"kind": "index", "held": True, "state": False, "dropout": False, "membranes": False}),
        (False, {"kind": "interleaved", "held": False, "state": True, "dropout": True, "membranes": False}),
        (True, {"kind": "index", "held": False, "state": True, "dropout": True, "membranes": True}),
    ],
    ids=["held", "from a state, with dropped neurons", "membranes and spikes"],
)
def test_recurrent_layers_are_those_of_the_reference(launched, model, spikes, options):
    """One launch per step forward and one backward; weights' gradients once; spikes are multiplied as bytes."""
    exact = results_of("torch", torch.float64, spikes, model=model, **options)
    found = results_of("triton", torch.float32, spikes, model=model, **options)
    for actual, expected in zip(itertools.chain(*found), itertools.chain(*exact), strict=True):
        assert rms(actual - expected) <= 1e-4 * rms(expected)  # float32 rounding over three steps
    assert launched["fused_forward_kernel of torch.uint8"] == launched["recurrent_backward_kernel"] == 2 * STEPS
    assert launched["neurons_forward_kernel"] == launched["neurons_backward_kernel"] == 0
    first = 1 if options["state"] else 0  # the spikes of a state, too
    assert launched["weight_gradient_kernel of torch.uint8"] == 3 + 2 * first  # of V twice, of the second W
    assert launched["weight_gradient_kernel of torch.float32"] == 1  # of the first W


@every_half
def test_recurrent_layers_in_16_bits(dtype):
    """The error beside that of plain PyTorch, which rounds currents; all inputs are exact, so spikes are equal."""
    options = {"model": "lif", "kind": "index", "held": True, "state": False, "dropout": False, "membranes": False}
    (exact, of_exact), (_, of_plain), (found, of_found) = (
        results_of(backend, each, False, **options)
        for backend, each in (("torch", torch.float64), ("torch", dtype), ("triton", dtype))
    )
    assert torch.equal(found[0].double(), exact[0])
    for actual, other, expected in zip(of_found, of_plain, of_exact, strict=True):
        assert rms(actual.double() - expected) <= max(1.5 * rms(other.double() - expected), 5e-3 * rms(expected))


def test_membranes_and_spikes_over_time_take_no_steps_in_turn(launched):
    """Neither a readout from membranes nor a loss on spikes: launches are as many as for counts, spikes are bytes."""
    device, counted = device_of("triton"), []
    for asked in (False, True):
        stack = Stack(STACKS_OF_UNITS[0], T)
        leaves = stack.leaves(torch.float32, device)
        *layers, last = stack.layers(leaves)
        layers.append(last._replace(membranes=asked))
        launched.clear()
        activity = g2g_stack(leaves["x"], layers, T, backend="triton", spikes=asked)
        total = activity.counts.sum()
        if asked:
            total = total + activity.membranes[2].mean(0).sum() + sum(train.dense().mean() for train in activity.spikes)
        total.backward()
        counted.append(dict(launched))
    assert counted[0] == counted[1]
    assert sum(number for kernel, number in counted[1].items() if kernel.endswith("uint8")) >= 4


@pytest.mark.ci
@pytest.mark.driver
def test_a_network_compiles_with_a_full_graph():
    device = device_of("triton")
    x = torch.rand(3, 20, generator=seeded(1)).to(device)
    net = G2GNet(20, 32, 10, "mixer", 0.3, 16, T=3, num_groups=2, backend="triton", generator=seeded(0)).to(device)
    results = []

    def outputs(x):
        activity = net.simulate(x)  # and a product and neurons alone
        return activity.counts, *activity.rates, lif(net.fc1(x), 0.9, 0.3, steps=3, backend="triton")

    for run in (outputs, torch.compile(outputs, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        counts, *others = run(x)
        loss(counts, others).backward()
        results.append((counts, *others, *(parameter.grad for parameter in net.parameters())))
    assert all(torch.equal(eager, graph) for eager, graph in zip(*results, strict=True))


def test_what_the_kernels_cannot_serve_is_refused_with_the_reason():
    """More elements than 32 bits count, too. Memory is not needed for that: the batch is one sample, seen often."""
    stack = Stack(IN_ORDER, T)
    tensors = {name: tensor.to(device_of("triton")) for name, tensor in stack.tensors.items()}
    layers, x = stack.layers(tensors), tensors["x"]
    most = 2**31 // 48  # of the widest layer's neurons
    assert triton.refuses(Call(x[:1].expand(most - 128, 21), tuple(layers), T)) is None
    for given, reason in (
        (x.half(), r"needs x and values of one dtype \(or autocast\), not torch.float16, torch.float32"),
        (x[:0], "needs a batch that is not empty"),
        (x.double(), "needs float32, float16 or bfloat16 tensors, not torch.float64"),
        (x[:1].expand(most + 1, 21), "serves fewer than 2³¹ neurons × samples per step, 128 samples at least"),
    ):
        with pytest.raises(BackendError, match=f"cannot serve this call of g2g_stack: triton chain: {reason}"):
            g2g_stack(given, layers, T, backend="triton")
