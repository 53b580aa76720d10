"""Operators call their implementation, and go through PyTorch's dispatcher where something may look at them."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import device_of, row_with, seeded
from stack_cases import STACKS, Stack
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from g2g_kernels import (
    BlockMask,
    Connection,
    GroupLayout,
    Neurons,
    Population,
    available_backends,
    g2g_linear,
    g2g_stack,
    lif,
)
from g2g_kernels.cpu import library
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.g2g_stack.cpu import PackedWords
from g2g_kernels.ops.g2g_stack.delays import Delay
from g2g_kernels.ops.g2g_stack.images import Convolution, Images, Pool
from g2g_kernels.ops.neurons import MODELS, run_neurons
from g2g_kernels.ops.record import TENSOR, Differentiable, RecordOperator, arguments, built, opened

COMPILED = [backend for backend in available_backends() if backend != "torch"]


def passes(backend: str, form=torch.Tensor.clone) -> list[torch.Tensor]:
    """Results and gradients of every operator, of tensors in some form."""
    stack = Stack(STACKS["one unit a group"], None)
    leaves = {name: form(leaf.detach()).requires_grad_() for name, leaf in stack.leaves(torch.float32).items()}
    activity = g2g_stack(leaves["x"], stack.layers(leaves), backend=backend)
    outputs = activity.counts, *activity.rates, *activity.states
    upstream = [form(torch.randn(each.shape, generator=seeded(5))) for each in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    x, values, bias, beta = (leaves[name] for name in ("x", "values0", "bias0", "beta0"))
    current = g2g_linear(x, values, stack.masks[0], bias, backend=backend)
    spikes = lif(current, beta, 1.0, backend=backend)
    upstream = [form(torch.randn(spikes.shape, generator=seeded(number))) for number in range(2)]
    return [*outputs, *grads, *torch.autograd.grad((current, spikes), (x, values, bias, beta), upstream)]


def name_of(function) -> str:
    return function.overloadpacket._qualified_op_name if isinstance(function, torch._ops.OpOverload) else ""


class Seen(TorchDispatchMode):
    """The operators that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(name_of(function))
        return function(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    """As :class:`Seen`, of what is called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(name_of(function))
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def profiled():
    found = SimpleNamespace()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield found
    found.names = {event.name for event in profiler.events() or []}


LOOKING = [("cpu", Seen), ("cpu", Functions), ("cpu", profiled), ("triton", Seen)]


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # of every profile, in PyTorch 2.10
@pytest.mark.parametrize(("backend", "observer"), [pair for pair in LOOKING if pair[0] in COMPILED])
def test_who_looks_at_operators_sees_them_and_the_same_bits(backend, observer, plain_memory):
    expected = passes(backend)
    with observer() as seen:
        found = passes(backend)
    prefix = "triton_" if backend == "triton" else ""
    ways = ("forward", "backward")[: 1 if observer is Functions else 2]  # no Python calls the backward pass
    pairs = itertools.product(("stack", "linear", "neurons"), ways)
    assert {f"g2g::{prefix}{operator}_{way}" for operator, way in pairs} <= seen.names
    assert all(map(torch.equal, found, expected))


def before_every_call(patch: pytest.MonkeyPatch, note) -> None:
    """Makes every call of an operator begin with ``note(operator, record)``."""
    for kind, method in ((RecordOperator, "run"), (Differentiable, "__call__")):
        function = getattr(kind, method)

        def noted(operator, record, *more, direct=function):
            note(operator, record)
            return direct(operator, record, *more)

        patch.setattr(kind, method, noted)


@pytest.mark.parametrize("backend", COMPILED)
def test_where_nobody_looks_nothing_is_dispatched(backend, monkeypatch):
    called = []

    def note(operator, record):
        monkeypatch.setattr(operator, "overload", None)
        called.append(operator)

    before_every_call(monkeypatch, note)
    passes(backend)
    assert len(called) == 6


def every_call(backend: str, patch: pytest.MonkeyPatch) -> list:
    """Each operator of a backend, with a record in which each tensor that there can be is, and what else the operator
    takes."""
    called = []
    before_every_call(patch, lambda *call: called.append(call))
    draw, size, samples, device = seeded(0), 6, 2, device_of(backend)
    side = GroupLayout(size, 2)

    def of_size(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, size, generator=draw).to(device).requires_grad_()

    def weights(block_size: int) -> tuple:
        mask = BlockMask.full(side, side, block_size)
        values = torch.rand(mask.num_units, *mask.unit_shape, generator=draw)
        return values.to(device).requires_grad_(), mask.to(device)

    def neurons_of(model: str, reset: str) -> tuple[Neurons, torch.Tensor]:
        of = MODELS[model]
        return Neurons(model, tuple(of_size() for _ in of.parameters), reset), of_size(len(of.states), samples)

    def layer(model: str, reset: str, *connections: Connection) -> Population:
        neurons, state = neurons_of(model, reset)
        dropped = torch.zeros(samples, size, dtype=torch.bool, device=device)
        sent = of_size(2, samples).detach() if backend == "cpu" else None
        return Population(neurons, connections, dropped, state, sent)

    learned = Delay(0, 2, torch.ones(size, dtype=torch.int64), of_size())
    for block_size, feedback in ((2, False), (2, True), (1, False)) if backend == "cpu" else ((2, False),):
        feed = Connection("linear", *weights(block_size), -1, None, of_size())
        own = Connection("linear", *weights(block_size), 0, Delay(1, 1))
        late = learned if backend == "cpu" and block_size == 2 else None
        above = Connection("linear", *weights(block_size), 0, late, of_size())
        back = [Connection("linear", *weights(block_size), 1, Delay(2, 2))] if feedback else []
        patch.setattr(library, "LIST_COST", 0.0 if block_size == 1 else 1.0)
        layers = layer("adlif", "zero", feed, own, *back), layer("synaptic", "none", above)
        result = g2g_stack(of_size(3, samples), layers, backend=backend)
        (result.counts.sum() + sum(state.sum() for state in result.states)).backward()
        result.spikes[0].dense()
    if backend == "cpu":  # chunks of two steps and one
        feed, own = (
            Connection("linear", *weights(2), -1, None, of_size()),
            Connection("linear", *weights(2), 0, Delay(1, 1)),
        )
        result = g2g_stack(of_size(3, samples), [layer("adlif", "zero", feed, own)], backend=backend, chunk=2)
        (result.counts.sum() + result.states[0].sum()).backward()
    if backend == "cpu":  # images
        shape, options = (1, 2, 3), Convolution((1, 1), (1, 1), (1, 1), 1)
        pool = Pool("max", (2, 2), (2, 2))
        of_layers, source = [], -1
        for before in ((), (pool,)):
            images = Images(shape, before, options)
            values, bias = torch.rand(1, 1, 3, 3).requires_grad_(), torch.rand(1).requires_grad_()
            feed = Connection("convolution", values, None, source, None, bias, images=images)
            parameters = torch.rand(1).requires_grad_(), torch.rand(1).requires_grad_()
            state = torch.rand(1, samples, 6 if source < 0 else 1).requires_grad_()
            of_layers.append(Population(Neurons("lif", parameters, "zero"), (feed,), None, state))
            source = 0
        result = g2g_stack(of_size(3, samples), of_layers, backend=backend)
        (result.counts.sum() + sum(state.sum() for state in result.states)).backward()
        result.spikes[0].dense()
    if backend == "cpu":  # lists by events
        late = Connection("linear", *weights(1), 0, Delay(1, 2, torch.ones(size, dtype=torch.int64)))
        of_inputs = [Connection("linear", *weights(1), -1, delay, of_size()) for delay in (None, Delay(1, 1))]
        of_events = layer("cubalif", "zero", *of_inputs, late)
        of_events = of_events._replace(sent=of_size(2, samples), neurons=of_events.neurons._replace(surrogate="boxcar"))
        result = g2g_stack(of_size(9, samples), [of_events], backend=backend, before=of_size(1, samples))
        (result.counts.sum() + result.states[0].sum() + result.sent[0].dense().sum()).backward()
    for model in MODELS if backend == "cpu" else ("lif", "synaptic", "adlif"):
        neurons, state = neurons_of(model, "subtract")
        run_neurons(of_size(3, samples), neurons, None, backend, state)[0].sum().backward()
    for block_size in (1, 2):
        with torch.autocast(device, torch.bfloat16, enabled=backend == "cpu"):
            g2g_linear(of_size(samples), *weights(block_size), of_size(), backend).sum().backward()
    patch.undo()
    detached = []
    for operator, record in called:
        (tensors, form), forward = opened(record), isinstance(operator, Differentiable)
        leaves = [each.detach().requires_grad_(forward and each.requires_grad) for each in tensors]
        detached.append((operator, built(form, leaves), [True] if forward else []))
    return detached


@pytest.mark.skipif("cpu" not in COMPILED, reason="the compiled CPU kernels are not built")
def test_hand_made_calls_are_refused_where_a_kernel_would_read_or_write_outside(monkeypatch):
    """Each tensor of each operator's call, made shorter or of fewer bytes."""
    every = every_call("cpu", monkeypatch)
    names = {operator.overload.name() for operator, *_ in every}
    kinds = ("linear", "neurons", "stack", "graph", "images", "loop", "events")
    both = {f"g2g::{kind}_{way}" for kind in kinds for way in ("forward", "backward")}
    assert names == {*both, "g2g::unpack_spikes", "g2g::unpack_images"}
    for operator, record, more in every:
        tensors, form = opened(record)
        operator.overload(*arguments(tensors, form), *more)
        fewer_bytes = {torch.float32: torch.float16, torch.float64: torch.float32, torch.int64: torch.int32}
        places = [part for part in form if part is TENSOR or isinstance(part, MaskTensors)]
        for number, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
            if place is not TENSOR:  # of masks the indices are checked where a plan is built
                continue
            axis = tensor.dim() - (2 if isinstance(record, PackedWords) else 1)  # (of words in time there may be fewer)
            shorter = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
            for wrong in (shorter, tensor.to(fewer_bytes.get(tensor.dtype, tensor.dtype))):
                if wrong is not tensor:
                    given = [*tensors[:number], wrong, *tensors[number + 1 :]]
                    with pytest.raises(ValueError, match=r"must be|mask|receives|give int64"):
                        operator.overload(*arguments(given, form), *more)


@pytest.mark.ci
@pytest.mark.driver
@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck_passes_every_operator(backend, monkeypatch, plain_memory):
    """Schemas, fakes and formulas of gradients. (What no kernel writes of what is kept is then equal, too.)"""
    every = every_call(backend, monkeypatch)
    monkeypatch.setattr(workspace, "poison", True)
    for operator, record, more in every:
        print(operator.overload.name())
        operator.opcheck(record, *more)


WATCHED = [
    *itertools.product(available_backends(), ("relabel_", "load_state_dict")),
    *((b, "values") for b in COMPILED),
]


@pytest.mark.parametrize(("backend", "change"), WATCHED)
@pytest.mark.parametrize("operator", ["stack", "linear"])
def test_what_changed_since_the_forward_pass_is_refused(operator, change, backend):
    stack = Stack(STACKS["one unit a group"], None)
    leaves, mask = stack.leaves(torch.float32), stack.masks[0]
    if operator == "stack":
        output = g2g_stack(leaves["x"], stack.layers(leaves), backend=backend).counts
    else:
        output = g2g_linear(leaves["x"], leaves["values0"], mask, leaves["bias0"], backend=backend)
    if change == "relabel_":
        mask.relabel_(torch.tensor([0]), mask.unit_row[1:2].clone(), mask.unit_col[:1].clone())
    elif change == "load_state_dict":
        mask.load_state_dict({"wiring": row_with(mask, unit_row=lambda t: t.flip(0), unit_col=lambda t: t.flip(0))})
    else:
        with torch.no_grad():
            leaves["values0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("backend", COMPILED)
def test_saved_tensors_may_be_moved_away_in_between(backend):
    """What hooks give back is read, and nothing that they took is kept alive."""
    stack = Stack(STACKS["one unit a group"], None)

    def gradients(pack, unpack):
        leaves = stack.leaves(torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            counts = g2g_stack(leaves["x"] + 0, stack.layers(leaves), backend=backend).counts
        counts.sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    expected = gradients(lambda tensor: tensor, lambda tensor: tensor)
    for unpack in (torch.Tensor.clone, lambda tensor: torch.stack([tensor, tensor], -1)[..., 0]):  # also with gaps
        assert all(map(torch.equal, gradients(torch.Tensor.clone, unpack), expected))
    with pytest.raises(RuntimeError, match="gave other sizes or dtypes back than it took"):
        gradients(torch.Tensor.half, lambda tensor: tensor)


class Plain(torch.Tensor):
    """A subclass, whose ``__torch_function__`` may look at every operator."""


#: forms of a tensor, the first two not in memory as they are read, and the same in memory
FORMS = {
    "negated": (lambda tensor: torch._neg_view(-tensor), torch.Tensor.clone),
    "zeros": (lambda tensor: torch._efficientzerotensor(tensor.shape), torch.zeros_like),
    "subclass": (lambda tensor: tensor.clone().as_subclass(Plain), torch.Tensor.clone),
}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(("form", "plain"), FORMS.values(), ids=FORMS)
def test_a_tensor_in_another_form_is_what_it_says(backend, form, plain):
    assert all(map(torch.equal, passes(backend, form), passes(backend, plain)))
