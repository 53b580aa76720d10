"""Neurons on the compiled CPU kernels: ``g2g::lif_forward`` (with its autograd formula) and ``g2g::lif_backward``.

The backward pass computes the membranes again from the currents and from those that the forward pass kept: the ones
after every ``EVERY`` steps, float32 [(T − 1) // EVERY, ..., N].
"""

import math

import torch

from g2g_kernels.cpu.library import NeuronLoopArguments, library, neuron_arguments, pointer, run
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.derivatives import refuse_backward
from g2g_kernels.ops.neurons.models import Neurons

#: steps from one kept membrane to the next (docs/cpu-performance.md, 16)
EVERY = 5


def refuses(current: torch.Tensor, population: Neurons, steps: int | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if population.model != "lif" or population.surrogate == "boxcar":
        return "serves LIF neurons, with every surrogate but boxcar"
    for tensor in (current, *population.parameters):
        if tensor.device.type != "cpu":
            return f"needs tensors on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"needs float32 tensors, not {tensor.dtype}"
    if current.numel() == 0:
        return "needs currents that are not empty"
    return None


def neurons(current: torch.Tensor, population: Neurons, steps: int | None) -> torch.Tensor:
    _, (beta, threshold), reset, surrogate, alpha = population
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (current, beta, threshold))
    spikes, _ = torch.ops.g2g.lif_forward(
        current.contiguous(), beta.contiguous(), threshold.contiguous(), steps or 0, reset, surrogate, alpha, keep
    )
    return spikes


_library = torch.library.Library("g2g", "FRAGMENT")
_library.define(
    "lif_forward(Tensor current, Tensor beta, Tensor threshold, int steps, str reset, str surrogate, float alpha, "
    "bool keep) -> (Tensor, Tensor)"
)
_library.define(
    "lif_backward(Tensor grad_spikes, Tensor current, Tensor beta, Tensor threshold, Tensor kept, int steps, "
    "str reset, str surrogate, float alpha, bool grad_current) -> (Tensor, Tensor, Tensor)"
)


def _arguments(
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
) -> NeuronLoopArguments:
    neurons = current.shape[-1]
    for name, tensor, allowed in (
        ("current", current, (current.numel(),)),
        ("beta", beta, (1, neurons)),
        ("threshold", threshold, (1, neurons)),
    ):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be a contiguous float32 tensor on the CPU")
        if tensor.numel() not in allowed:
            raise ValueError(f"{name} has {tensor.numel()} entries, expected one of {allowed}")
    return NeuronLoopArguments(
        neurons=neuron_arguments("lif", reset, surrogate, alpha, (beta, threshold)),
        current=current.data_ptr(),
        samples=math.prod(current.shape[:-1] if steps else current.shape[1:-1]),
        size=neurons,
        steps=steps or current.shape[0],
        threads=torch.get_num_threads(),
        held=steps > 0,
        every=EVERY,
    )


def _shape(current: torch.Tensor, steps: int) -> tuple[int, ...]:
    return (steps, *current.shape) if steps else tuple(current.shape)


def _kept_shape(current: torch.Tensor, steps: int, keep: bool) -> tuple[int, ...]:
    shape = _shape(current, steps)
    return ((shape[0] - 1) // EVERY, *shape[1:]) if keep else (0,)


def _forward(
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = _arguments(current, beta, threshold, steps, reset, surrogate, alpha)
    spikes = workspace.empty(_shape(current, steps))
    kept = workspace.empty(_kept_shape(current, steps, keep))
    arguments.spikes, arguments.kept = spikes.data_ptr(), pointer(kept)
    run(library().g2g_neurons_forward, arguments)
    return spikes, kept


def _forward_fake(
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return current.new_empty(_shape(current, steps)), current.new_empty(_kept_shape(current, steps, keep))


def _backward(
    grad_spikes: torch.Tensor,
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    kept: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    grad_current: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = _arguments(current, beta, threshold, steps, reset, surrogate, alpha)
    for name, tensor, shape in (
        ("grad_spikes", grad_spikes, _shape(current, steps)),
        ("kept", kept, _kept_shape(current, steps, keep=True)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and float32 {list(shape)}")
    to_current = workspace.empty(tuple(current.shape)) if grad_current else current.new_empty(0)
    to_beta, to_threshold = torch.empty_like(beta), torch.empty_like(threshold)
    arguments.grad_spikes, arguments.kept = grad_spikes.data_ptr(), pointer(kept)
    arguments.grad_current = pointer(to_current)
    for parameter, grad in zip(arguments.neurons.parameters, (to_beta, to_threshold), strict=False):
        parameter.grad = grad.data_ptr()
    run(library().g2g_neurons_backward, arguments)
    return to_current, to_beta, to_threshold


def _backward_fake(
    grad_spikes: torch.Tensor,
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    kept: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    grad_current: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    to_current = current.new_empty(current.shape if grad_current else 0)
    return to_current, torch.empty_like(beta), torch.empty_like(threshold)


def _setup_context(ctx, inputs, output):
    current, beta, threshold, *ctx.options, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(current, beta, threshold, output[1])


def _autograd(ctx, grad_spikes, _kept):
    if grad_spikes is None:
        return (None,) * 8
    needed = ctx.needs_input_grad
    grads = torch.ops.g2g.lif_backward(grad_spikes.contiguous(), *ctx.saved_tensors, *ctx.options, needed[0])
    return (*(grad if wanted else None for grad, wanted in zip(grads, needed[:3], strict=True)), *(None,) * 5)


for _name, _function, _fake in (
    ("lif_forward", _forward, _forward_fake),
    ("lif_backward", _backward, _backward_fake),
):
    _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"g2g::{_name}", _fake, lib=_library)
torch.library.register_autograd("g2g::lif_forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("g2g::lif_backward", refuse_backward, lib=_library)
