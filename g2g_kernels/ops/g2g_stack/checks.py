"""Checks of calls of ``g2g_stack``: every error names the population, before any work. They read no tensor's values."""

from collections.abc import Sequence

import torch

from g2g_kernels.choices import check_choice
from g2g_kernels.numbers import COUNT
from g2g_kernels.ops.checks import check_connection, check_tensor
from g2g_kernels.ops.g2g_stack.delays import check_delay, seen_ahead
from g2g_kernels.ops.g2g_stack.images import check_images, ends_of
from g2g_kernels.ops.g2g_stack.population import Call, Connection, Population, components, reaches, size_of
from g2g_kernels.ops.neurons.checks import check_neurons, check_state, check_steps
from g2g_kernels.tracing import replaced

#: what a connection may be
KINDS = ("linear", "convolution", "pool")


def checked(call: Call) -> Call:
    """The call with numbers as tensors; raises ValueError for one that does not match."""
    if call.modules is not None:
        return call
    x, populations = call.x, call.populations
    steps = check_steps(call.steps)
    check_tensor("x", x)
    if not populations:
        raise ValueError("populations is empty; give at least one Population")
    expected = 2 if steps is not None else 3
    if x.dim() != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [T, B, in], or [B, in] with steps")
    if steps is None and len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: there must be at least one time step")
    for number, population in enumerate(populations):
        if not isinstance(population, Population) or not population.connections:
            what = f"a {type(population).__name__}" if not isinstance(population, Population) else "without connections"
            raise ValueError(f"population {number} is {what}; give a Population with at least one Connection")
        for each in population.connections:
            check_choice(f"kind of a connection to population {number}", each.kind, KINDS)
            if each.onto is not None:
                check_choice(f"onto of a connection to population {number}", each.onto, ("membrane",))
            if each.kind == "linear":
                check_connection(f" of a connection to population {number}", each.values, each.mask, each.bias)
            if each.kind != "linear" or each.images is not None:
                check_images(f" to population {number}", each)
    with_tensors = []
    for number, population in enumerate(populations):
        suffix = f" of population {number}"
        neurons = check_neurons(suffix, population.neurons, size_of(population), x)
        with_tensors.append(replaced(population, neurons=neurons))
        shape = x.shape[-2], size_of(population)
        wanted = population.membranes
        if isinstance(wanted, tuple) and not all([0 <= each < shape[1] for each in wanted]):
            raise ValueError(f"membranes{suffix} are {wanted}; give numbers of its {shape[1]} neurons, from 0")
        if population.dropped is not None:
            check_dropped(suffix, population.dropped, shape)
        if population.state is not None:
            check_state(suffix, population.state, neurons, shape)
            _check_like(f"state{suffix}", population.state, x)
        if population.sent is not None:
            _check_sent(f"sent{suffix}", population.sent, *shape)
            _check_like(f"sent{suffix}", population.sent, x)
    check_ends(populations, x.shape[-1])
    call = replaced(call, populations=tuple(with_tensors), steps=None if steps is None else int(steps))
    if call.before is not None:
        _check_sent("before", call.before, x.shape[-2], x.shape[-1])
        _check_like("before", call.before, x)
        if not reaches(with_tensors)[-1]:
            raise ValueError("before is given, but no delay reads inputs of earlier steps; leave it out")
    for component in components(with_tensors):
        inside = component.members if component.period else ()
        for number in inside:
            for each in populations[number].connections:
                if each.source in inside and each.images is not None and each.images.norm:
                    raise ValueError(
                        f"a connection to population {number} is on a cycle and has a norm that trains, whose "
                        "statistics are of all steps; leave the norm out, or call it in evaluation mode"
                    )
    return call


def check_ends(populations: Sequence[Population], inputs: int | None) -> None:
    """Raises ValueError unless each connection joins its source to its population; None: any number of ``inputs``."""
    sizes = [*(size_of(population) for population in populations), inputs]
    for number, population in enumerate(populations):
        for connection in population.connections:
            _check_ends(number, connection, sizes)


def checked_sparse(call: Call) -> torch.Tensor:
    """The sparse inputs of a call, coalesced; raises ValueError unless they are [T, B, in] of numbers without gradient,
    for kernels."""
    x = call.x
    if x.dim() != 3 or x.dense_dim() or call.steps is not None:
        raise ValueError(f"x is sparse and has shape {list(x.shape)}; give [T, B, in], each entry with three indices")
    if not len(x):
        raise ValueError(f"x is sparse and has shape {list(x.shape)}; give at least one step")
    check_events(x)
    if x.requires_grad:
        raise ValueError("sparse inputs have no gradient; give inputs.to_dense(), or inputs.detach()")
    if call.modules is not None:
        raise ValueError(f"sparse inputs run on kernels only, and modules are called ({call.modules.why})")
    return x.coalesce()


def check_events(x: torch.Tensor) -> None:
    """Raises ValueError for indices of sparse tensors outside their shape: coalescing would move them."""
    indices = x._indices()
    if ((indices < 0) | (indices >= torch.tensor(x.shape[: x.sparse_dim()], device=x.device)[:, None])).any():
        raise ValueError(f"x is sparse and has indices outside its shape {list(x.shape)}")


def check_chunk(chunk: int, call: Call, name: str = "chunk") -> int:
    """``chunk`` as an int. Raises ValueError, naming the argument, unless a call can run so many steps at a time."""
    chunk = COUNT.check(name, chunk)
    if call.spikes:
        raise ValueError(
            f"{name}={chunk} does not keep the spikes over time that spikes=True gives a gradient; give one of them"
        )
    if any(each.images is not None and each.images.norm for of in call.populations for each in of.connections):
        raise ValueError(f"{name}={chunk} has no statistics of all steps, which a norm that trains takes; leave it out")
    delays = [each.delay for population in call.populations for each in population.connections]
    for delay in delays:
        if delay is not None and delay.least < seen_ahead(delay):
            raise ValueError(
                f"{name}={chunk} does not know the spikes after a chunk, which the gradient of width {delay.width} of "
                f"a learned delay of {delay.least} reads; leave it out, fix the delays, or give a width up to the "
                "least delay that can be learned (0, on a cycle 1)"
            )
    return chunk


def _check_ends(number: int, connection: Connection, sizes: Sequence[int | None]) -> None:
    """Raises ValueError unless a connection joins its source to population ``number``; sizes: the inputs' last."""
    source, (outputs, inputs), suffix = connection.source, ends_of(connection), f" to population {number}"
    if isinstance(source, bool) or not isinstance(source, int) or not -1 <= source < len(sizes) - 1:
        raise ValueError(
            f"a connection{suffix} has the source {source}; give a population's number below {len(sizes) - 1}, or −1 "
            "for the inputs"
        )
    if outputs != sizes[number]:
        raise ValueError(f"a connection{suffix} has {outputs} outputs, but there are {sizes[number]} neurons")
    if sizes[source] not in (inputs, None):
        raise ValueError(f"a connection{suffix} has {inputs} inputs but receives {sizes[source]}")
    if connection.delay is not None:
        check_delay(suffix, connection.delay, inputs)


def _check_sent(name: str, sent: torch.Tensor, batch: int, size: int) -> None:
    """Raises ValueError unless ``sent`` is [D, B, N]."""
    check_tensor(name, sent)
    if sent.dim() != 3 or tuple(sent.shape[1:]) != (batch, size):
        raise ValueError(f"{name} has shape {tuple(sent.shape)}; expected [D, {batch}, {size}]")


def _check_like(name: str, state: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ValueError for a state on another device than x, or of more bits than this run's states."""
    if state.device != x.device:
        raise ValueError(f"{name} is on {state.device}, x on {x.device}; give state.to(x.device)")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.promote_types(state.dtype, dtype) != dtype:
        raise ValueError(f"{name} is {state.dtype}, those of x in {x.dtype} are {dtype}; give state.to({dtype})")


def check_dropped(suffix: str, dropped: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``dropped`` is bool [B, N], which is ``shape``."""
    if not isinstance(dropped, torch.Tensor) or dropped.dtype != torch.bool or tuple(dropped.shape) != shape:
        what = f"{dropped.dtype} {tuple(dropped.shape)}" if isinstance(dropped, torch.Tensor) else repr(dropped)
        raise ValueError(f"dropped{suffix} must be bool {shape}, one entry per sample and neuron, not {what}")
