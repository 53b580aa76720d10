"""Neurons on the compiled CPU kernels: ``g2g::neurons_forward`` (with its autograd formula), ``g2g::neurons_backward``,
which recomputes the states from the currents and the states that the forward pass kept after every ``EVERY`` steps,
float32 [(T − 1) // EVERY, states, ..., N].
"""

import functools
import math
from collections.abc import Sequence
from ctypes import Structure

import torch

from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import OPTIONS, library, pointer, run, too_large
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.neurons.call import NeuronsCall, operator_of
from g2g_kernels.ops.neurons.models import MODELS, RESETS, Neurons
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.ops.record import Backward

OPTIONS.update({"resets": RESETS, "surrogates": SURROGATES, "models": MODELS})
for _name, _model in MODELS.items():
    OPTIONS.update({f"{_name}.{kind}": getattr(_model, kind) for kind in ("states", "parameters", "decays")})

#: steps between states that are kept (g2g_kernels/csrc/PERFORMANCE.md, LIF alone)
EVERY = 5


@functools.lru_cache(1024)
def _options(model: str, reset: str, surrogate: str, alpha: float, entries: tuple[int, ...]) -> Structure:
    """A population's options without its parameters, whose numbers of elements are ``entries``."""
    numbers = list(MODELS).index(model), RESETS.index(reset), list(SURROGATES).index(surrogate)
    options = structures.Neurons(**dict(zip(("model", "reset", "surrogate"), numbers, strict=True)), alpha=alpha)
    for parameter, count in zip(options.parameters, entries):  # noqa: B905  # of the models with the most
        parameter.per_neuron = count > 1
    return options


def neuron_arguments(population: Neurons, grads: Sequence[torch.Tensor | None] = ()) -> Structure:
    """A population of neurons, and the addresses of the gradients of its parameters, if wanted."""
    model, parameters, reset, surrogate, alpha = population
    entries = tuple(map(torch.Tensor.numel, parameters))
    arguments = structures.Neurons.from_buffer_copy(_options(model, reset, surrogate, alpha, entries))
    places = arguments.parameters
    for k, parameter in enumerate(parameters):
        place = places[k]
        place.value = parameter.data_ptr()
        if grads and (grad := grads[k]) is not None:
            place.grad = grad.data_ptr()
    return arguments


def refuses(
    current: torch.Tensor,
    population: Neurons,
    steps: int | None,
    state: torch.Tensor | None = None,
    to_membrane: torch.Tensor | None = None,
) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if to_membrane is not None:
        return "takes no currents onto the membrane"
    for tensor in (current, *population.parameters, *(() if state is None else (state,))):
        if tensor.device.type != "cpu":
            return f"needs tensors on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"needs float32 tensors, not {tensor.dtype}"
    if current.numel() == 0:
        return "needs currents that are not empty"
    samples = math.prod(current.shape[0 if steps else 1 : -1])
    return too_large(steps=steps or len(current), neurons=current.shape[-1], samples=samples)


def neurons(
    current: torch.Tensor, population: Neurons, steps: int | None, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    spikes, last, _ = FORWARD(NeuronsCall.of(current, population, steps, state))
    return spikes, last


def _kept_shape(call: NeuronsCall) -> tuple[int, ...]:
    steps, *rest = call.shape
    return ((steps - 1) // EVERY, len(call.model.states), *rest)


def _arguments(call: NeuronsCall, grads: Sequence[torch.Tensor | None] = ()) -> Structure:
    steps, samples, size = call.flat_shape
    return structures.NeuronLoop(
        neurons=neuron_arguments(call.population, grads),
        current=call.current.data_ptr(),
        state=pointer(call.state),
        samples=samples,
        size=size,
        steps=steps,
        threads=torch.get_num_threads(),
        held=call.held,
        every=EVERY,
    )


def _forward(call: NeuronsCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = _arguments(call)
    spikes, last = workspace.empty(call.shape), workspace.empty(call.state_shape)
    kept = workspace.empty(_kept_shape(call) if keep else (0,))
    arguments.spikes, arguments.last, arguments.kept = spikes.data_ptr(), last.data_ptr(), pointer(kept)
    run(library().g2g_neurons, arguments)
    return spikes, last, kept


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, (kept,), (grad_spikes, grad_last), _ = given
    if grad_spikes is None:
        grad_spikes = call.current.new_zeros(call.shape)
    grads, to = given.made(workspace.alike)
    arguments = _arguments(call, to.population.parameters)
    arguments.grad_spikes, arguments.kept = grad_spikes.data_ptr(), pointer(kept)
    arguments.grad_current = pointer(to.current)
    arguments.grad_last, arguments.grad_state = pointer(grad_last), pointer(to.state)
    run(library().g2g_neurons, arguments, backward=True)
    return grads


FORWARD = operator_of("", ("CPU",), _forward, _backward, _kept_shape)
