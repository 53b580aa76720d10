"""The table of ways to run a network, and the choice among them.

In order of preference: Triton's chain; the CPU's chain, graph, images, events and lists; operators in turn on the
network's backend; ``g2gnet`` adds its modules in turn; and the reference. What is true before any way is made so before
the choice (:func:`normalised`): dropped populations have state 0, and inputs that arrive later are inputs of now.
"""

import math
import os
from collections.abc import Hashable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from g2g_kernels.dispatch import ANY, BACKENDS, Choice, Operator, Way, forced_backend, listed
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.ops.g2g_conv2d import g2g_conv2d
from g2g_kernels.ops.g2g_conv2d import operator as convolution_operator
from g2g_kernels.ops.g2g_linear import g2g_linear
from g2g_kernels.ops.g2g_linear import operator as linear_operator
from g2g_kernels.ops.g2g_stack import cpu, events, graph, image_layers, recurrent_lists, reference
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, Synapses
from g2g_kernels.ops.g2g_stack.checks import check_chunk, checked, checked_sparse
from g2g_kernels.ops.g2g_stack.chunks import SparseSteps, in_chunks
from g2g_kernels.ops.g2g_stack.delays import Train, arrived
from g2g_kernels.ops.g2g_stack.images import convolved
from g2g_kernels.ops.g2g_stack.population import Call, reaches, size_of, total_steps
from g2g_kernels.ops.g2g_stack.reference import in_turn
from g2g_kernels.ops.neurons import MODELS, run_neurons
from g2g_kernels.ops.neurons import operator as neurons_operator
from g2g_kernels.ops.record import Form, opened
from g2g_kernels.tracing import is_traced, is_transformed, replaced


def _triton() -> ModuleType:
    from g2g_kernels.ops.g2g_stack import triton  # imports Triton, which is optional

    return triton


# --- operators in turn ------------------------------------------------------------------------------------------


def refuses_operators(call: Call) -> str | None:
    """Why the operators cannot serve a call on its backend, or None: where a transform is at work they can."""
    if call.modules is not None:
        return call.modules.why
    if call.plain:
        return None
    forced = forced_backend(call.backend)
    if forced == "torch":
        return "those of backend torch are the reference"
    like = call.x.new_empty(())
    asked: list[tuple[Operator, tuple[Any, ...]]] = []
    for population in call.populations:
        for each in population.connections:
            if each.kind == "linear":
                at_once = each.source < 0 and each.images is None
                received = call.x if at_once else like.expand(*call.x.shape[:-1], each.mask.shape[1])
                asked.append((linear_operator, (received, each.values, each.mask, each.bias)))
            elif each.images is not None and each.images.convolution is not None:
                received = like.expand(math.prod(call.x.shape[:-1]), *convolved(each.images))
                asked.append((convolution_operator, (received, each.values, each.bias, *each.images.convolution)))
        if forced:
            current = like.expand(total_steps(call), call.x.shape[-2], size_of(population))
            to_membrane = current if any([each.onto for each in population.connections]) else None
            asked.append((neurons_operator, (current, population.neurons, None, population.state, to_membrane)))
    serving = set()
    for operator, arguments in asked:
        name, _, reasons = operator.find(*arguments, backend=forced)
        if name is None:
            return "; ".join(listed(reasons))
        serving.add(name)
    return f"no other backend serves them ({'; '.join(listed(reasons))})" if serving == {"torch"} else None


#: of each kind of connection with weights
OPERATORS: reference.Products = {"linear": g2g_linear, "convolution": g2g_conv2d}


def run_operators(call: Call) -> Activity:
    """Population by population, by operators that find their own backends."""
    backend = call.backend
    products: reference.Products = {name: partial(each, backend=backend) for name, each in OPERATORS.items()}
    neurons = partial(run_neurons, backend=backend)
    neurons = partial(cpu.in_float32, neurons) if backend == "cpu" else neurons
    loop_of = None if call.plain else partial(recurrent_lists.loop_of, backend=backend)
    return in_turn(call, products, neurons, loop_of)


# --- the table --------------------------------------------------------------------------------------------------

#: the ways to run a network; each takes a :class:`Call`
WAYS = Operator("g2g_stack")
cpu_chain = partial(cpu.g2g_stack, again=graph.g2g_graph)
WAYS.register_module("triton", _triton, "triton chain")
WAYS.register("cpu", cpu_chain, cpu.refuses, "cpu chain")
WAYS.register("cpu", graph.g2g_graph, graph.refuses, "cpu graph")
WAYS.register("cpu", partial(image_layers.g2g_images, again=lambda call: run(call)), image_layers.refuses, "cpu images")
WAYS.register("cpu", events.g2g_events, events.refuses, "cpu events")
WAYS.register("cpu", recurrent_lists.g2g_lists, recurrent_lists.refuses, "cpu lists")
WAYS.register(ANY, run_operators, refuses_operators, "operators in turn")
WAYS.register("torch", reference.g2g_stack, reference.refuses, "reference")


def choose(call: Call, chunk: int | None = None) -> Choice:
    """Which way runs a call, ``chunk`` steps at a time, and why none before it."""
    if chunk is not None:
        check_chunk(chunk, call)
    if _is_sparse(call.x):
        call = replaced(call, x=SparseSteps(checked_sparse(call))[:1])
    plain = is_transformed(opened(call)[0])
    now = normalised(checked(replaced(call, plain=plain, carried=chunk is not None)))
    return WAYS.choose(now, backend=call.backend)


def _truncated(call: Call) -> Call:
    """A call whose ``truncate`` is possible, and None unless it is shorter than the run."""
    if (truncate := call.truncate) is None:
        return call
    truncate = check_chunk(truncate, call, "truncate")
    return replaced(call, truncate=truncate if truncate < total_steps(call) else None)


def run(call: Call, chunk: int | None = None) -> Activity:
    """The activity of a call by the first way that does not refuse it, ``chunk`` steps at a time (None: all)."""
    if _is_sparse(call.x):
        return _run_sparse(call, chunk)
    tensors, form = opened(call)
    if is_transformed(tensors):
        call = replaced(call, plain=True)
    if call.truncate is not None:
        call = checked(_truncated(call))
        if (truncate := call.truncate) is None:
            tensors, form = opened(call)
        elif WAYS.choose(normalised(call), backend=call.backend).way.run is not events.g2g_events:
            parts = in_chunks(partial(run, chunk=chunk), truncate, replaced(call, truncate=None), truncated=True)
            return _finished(call, call, parts)
        else:
            chunk = None  # which would save nothing
    if chunk is not None:
        chunk = check_chunk(chunk, call)
        call = checked(call)
        if _runs_chunks(call, chunk):
            now = normalised(call)
            return _finished(call, now, cpu_chain(now, chunk=chunk))
        return _finished(call, call, in_chunks(run, chunk, call))
    key = None if is_traced() else _signature(call, tensors, form)
    try:
        way = None if key is None else _chosen.get(key)
    except TypeError:  # sizes that are symbols have no hash
        way = key = None
    if way is not None:
        now = normalised(call)
        return _finished(call, now, way.run(now))
    given, call = call, checked(call)
    now = normalised(call)
    way = WAYS.choose(now, backend=call.backend).way
    if key is not None:
        of = [parameter for population in given.populations for parameter in population.neurons.parameters]
        if all([isinstance(parameter, torch.Tensor) for parameter in of]):  # a check makes tensors of numbers
            if len(_chosen) > 1000:
                _chosen.clear()
            _chosen[key] = way
    return _finished(call, now, way.run(now))


def _runs_chunks(call: Call, chunk: int) -> bool:
    """Whether one operator runs all chunks of a call: the chain that serves its parts, where they carry states alone.
    It takes contiguous inputs: of others, as of one sample that is expanded over time, only parts are copied."""
    if call.carried or is_traced() or not call.x.is_contiguous() or any(reaches(call.populations)):
        return False
    steps = min(chunk, total_steps(call))
    part = replaced(call, x=call.x[:steps]) if call.steps is None else replaced(call, steps=steps)
    return WAYS.choose(normalised(replaced(part, carried=True)), backend=call.backend).way.run is cpu_chain


#: numbers of a sparse input that are made dense at a time
DENSE = 1 << 24


def _is_sparse(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.sparse_coo


def _run_sparse(call: Call, chunk: int | None) -> Activity:
    """A run of sparse inputs: as they are by events; otherwise, and in chunks, they are made dense, as many steps at a
    time as :data:`DENSE` allows."""
    x = checked_sparse(call)
    call = _truncated(replaced(call, x=x))
    if chunk is None or call.truncate is not None:  # a truncated run by events is never one in chunks
        of_step = checked(replaced(call, x=SparseSteps(x)[:1], plain=is_transformed(opened(call)[0])))
        if WAYS.choose(normalised(of_step), backend=call.backend).way.run is events.g2g_events:
            now = normalised(replaced(of_step, x=x))
            return _finished(call, now, events.g2g_events(now))
    most = max(1, DENSE // max(1, x[0].numel()))
    if len(x) <= most:
        return run(replaced(call, x=x.to_dense()), chunk)
    if call.spikes:
        raise ValueError(
            f"sparse inputs {list(x.shape)} are run {chunk or most} steps at a time, which keeps no gradient of spikes "
            "over time; give fewer steps, or inputs.to_dense()"
        )
    of_chunk = check_chunk(chunk or most, call)
    rows: Any = SparseSteps(x)
    if (truncate := call.truncate) is not None:
        if truncate > most:
            raise ValueError(
                f"sparse inputs {list(x.shape)} are run {most} steps at a time, over which no gradient of "
                f"truncate={truncate} steps passes; give inputs.to_dense(), or a truncate up to {most}"
            )
        own = most - most % truncate
        return in_chunks(partial(run, chunk=chunk), own, replaced(call, x=rows), truncated=True)
    return in_chunks(run, of_chunk, replaced(call, x=rows))


#: which way runs calls of a signature, once one of them has been checked
_chosen: dict[Hashable, Way] = {}
#: the types of parts that cannot change in place
_PLAIN = {type(None), bool, int, float, str, tuple, object}


def _signature(call: Call, tensors: Sequence[torch.Tensor], form: Form) -> Hashable:
    """The key of a call among :data:`_chosen`: all of it but the values of its tensors, which no check and no choice
    reads (a test holds that), and the backends; None if a part may change in place."""
    if not isinstance(call.x, torch.Tensor) or isinstance(call.steps, torch.Tensor):
        return None
    key: list[Any] = [call.plain, torch.is_grad_enabled(), os.environ.get("G2G_BACKEND")]
    key += *BACKENDS.values(), *WAYS.ways.values()
    for tensor in tensors:
        key += tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad
    for part in form:
        kind = type(part)
        if kind is BlockMask:
            key.append(part.changes)
        elif kind in _PLAIN:
            key += part, kind  # True is 1, but no number of steps
        else:
            return None
    device = call.x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        key.append(torch.get_autocast_dtype(device))
    return tuple(key)


# --- what is true before any way --------------------------------------------------------------------------------


def normalised(call: Call) -> Call:
    """The call with states of dropped neurons that are 0, ``onto`` where it says something alone, and, where one
    connection receives the inputs, with inputs that arrive at once. Modules are given what their network was given."""
    if call.modules is not None:
        return call
    populations, of_inputs = [*call.populations], []
    for number, population in enumerate(call.populations):
        for place, each in enumerate(population.connections):
            if each.onto is not None and MODELS[population.neurons.model].takes is None:  # the current goes there, too
                alike = tuple([replaced(one, onto=None) for one in population.connections])
                populations[number] = replaced(populations[number], connections=alike)
                call = replaced(call, populations=tuple(populations))
                each = alike[place]
            if each.source < 0:
                of_inputs.append((number, place, each))
        if population.dropped is not None and population.state is not None:
            silent = population.state.masked_fill(population.dropped, 0)
            populations[number] = replaced(populations[number], state=silent)
            call = replaced(call, populations=tuple(populations))
    if len(of_inputs) != 1 or of_inputs[0][2].delay is None or _is_sparse(call.x):  # events take them as they are
        return call
    ((number, place, each),) = of_inputs
    train = _inputs(call)
    received = arrived(train, each.delay, 0, total_steps(call))
    if received is None:
        received = train.nothing().expand(total_steps(call), *call.x.shape[-2:])
    connections = [*populations[number].connections]
    connections[place] = replaced(each, delay=None)
    populations[number] = replaced(populations[number], connections=tuple(connections))
    return replaced(call, x=received, populations=tuple(populations), steps=None, before=None)


def _inputs(call: Call) -> Train:
    held = call.steps is not None
    train = Train(call.x if held else call.x[0], call.before)
    train.append(call.x.expand(total_steps(call), *call.x.shape) if held else call.x)
    return train


def _finished(call: Call, now: Call, activity: Activity) -> Activity:
    """The activity of ``now`` as that of the call."""
    states, sent = activity.states, activity.sent
    for number, population in enumerate(call.populations):
        if states is not None and population.dropped is not None:
            silent = states[number].masked_fill(population.dropped, 0)
            states = (*states[:number], silent, *states[number + 1 :])
    if now.x is not call.x:
        total, reach = total_steps(call), reaches(call.populations)[-1]
        of_inputs = DenseSpikes(_inputs(call).window(total - reach, total)) if reach else None
        sent = (*(sent[:-1] or (None,) * len(call.populations)), of_inputs)
    synapses = activity.synapses
    # a part's operations are counted with those of its run
    if call.modules is None and not call.carried and not torch.compiler.is_compiling():
        synapses = Synapses(call, activity.spikes)
    return replaced(activity, states=states, sent=sent, synapses=synapses)
