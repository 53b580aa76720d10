"""Plain PyTorch neurons: a loop over time in each direction, for any model. The oracle for every other backend.

The forward pass keeps only the states; spikes and resets follow from the membranes, so the currents can be freed.
Backward, step t begins with the gradient that reaches its membrane through its spike,

    σ'(U_t − θ)·∂L/∂S_t         and  ∂L/∂θ −= σ'(U_t − θ)·∂L/∂S_t

and the model's ``charge_backward`` passes the states' gradients on to the current, the states before and the
parameters. No gradient passes through R.
"""

from collections.abc import Sequence

import torch

from g2g_kernels.ops.derivatives import gradients_of, needs_plain_operations
from g2g_kernels.ops.neurons.models import MODELS, Neurons, Tensors
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.tracing import autocast_of, replaced


def neurons(
    current: torch.Tensor,
    population: Neurons,
    steps: int | None,
    state: torch.Tensor | None = None,
    to_membrane: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = population.parameters
    if not torch.is_grad_enabled():  # the Function would see parameters that require grad, and keep all states
        current, parameters = current.detach(), tuple(parameter.detach() for parameter in parameters)
        state = None if state is None else state.detach()
        to_membrane = None if to_membrane is None else to_membrane.detach()
    edges = [
        _Edge.apply(each) if torch.is_grad_enabled() and each is not None and each.requires_grad else None
        for each in (current, to_membrane)
    ]
    return _Neurons.apply(current, state, to_membrane, steps, replaced(population, parameters=()), *edges, *parameters)


def _joined(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.stack`` in operators that DirectML has."""
    return torch.cat([state[None] for state in states])


def _parted(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inverse of :func:`_joined`."""
    return tuple(states[number] for number in range(len(states)))


def _as_used(model: str, parameters: Tensors, dtype: torch.dtype) -> Tensors:
    """The parameters in ``dtype``, decays clamped to 0 … 1."""
    number = len(MODELS[model].decays)
    used = [parameter.to(dtype) for parameter in parameters]
    return *(decay.clamp(0, 1) for decay in used[:number]), *used[number:]


class _Neurons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        # not by name: without gradients, torch.compile of PyTorch 2.6 to 2.12 leaves ctx out of a call that has as many
        # arguments as the signature has names
        (current, state, to_membrane, steps, options, *edges), parameters = args[:7], args[7:]
        model = MODELS[options.model]
        held = steps is not None
        num_steps = steps if held else current.shape[0]
        shape = current.shape if held else current.shape[1:]
        dtype = torch.promote_types(current.dtype, torch.float32)  # states of half-precision currents in float32
        used = _as_used(model.name, parameters, dtype)
        keep = any(ctx.needs_input_grad)

        spikes = current.new_empty((num_steps, *shape))
        kept = [current.new_empty((num_steps if keep else 0, *shape), dtype=dtype) for _ in model.states]
        if state is None:
            states = tuple(torch.zeros(shape, dtype=dtype, device=current.device) for _ in model.states)
        else:
            states = _parted(state.to(dtype))
        fired = states[-1] > used[-1]

        def spike(membrane: torch.Tensor) -> torch.Tensor:
            return (membrane > used[-1]).to(dtype)

        for t in range(num_steps):
            now = (current if held else current[t]).to(dtype)
            before, states = states, model.charge(states, fired, spike, now, used, options.reset)
            if to_membrane is not None and model.takes is not None:
                own = (to_membrane if held else to_membrane[t]).to(dtype)
                taken = torch.where(model.takes(before, fired, used, options.reset), states[-1] + own, states[-1])
                states = (*states[:-1], taken)
            fired = (states[-1] if model.compared is None else model.compared(before, states[-1], used)) > used[-1]
            spikes[t] = fired
            if keep:
                for of_all_steps, each in zip(kept, states, strict=True):
                    of_all_steps[t] = each
        if keep:
            ctx.save_for_backward(*kept, *parameters, state, *edges)
            ctx.call = steps, options, current.dtype
        return spikes, _joined(states)

    @staticmethod
    def backward(ctx, grad_spikes, grad_last):
        steps, options, current_dtype = ctx.call
        model = MODELS[options.model]
        derivative = SURROGATES[options.surrogate].derivative
        *saved, state, edge, edge_of_membrane = ctx.saved_tensors  # read once: non-reentrant checkpoints refuse more
        kept, parameters = saved[: len(model.states)], saved[len(model.states) :]
        need_current, need_state, need_own, _, _, _, _, *need_parameters = ctx.needs_input_grad
        if needs_plain_operations((grad_spikes, grad_last)):
            return _again(ctx, (edge, edge_of_membrane), state, kept, parameters, (grad_spikes, grad_last))
        held = steps is not None
        membranes = kept[-1]
        dtype, shape = membranes.dtype, membranes.shape[1:]
        used = _as_used(model.name, parameters, dtype)
        theta = used[-1]

        def slope(membrane: torch.Tensor) -> torch.Tensor:
            return derivative(membrane - theta, options.alpha)

        zeros = torch.zeros(shape, dtype=dtype, device=membranes.device)
        first = (zeros,) * len(kept) if state is None else _parted(state.to(dtype))
        grads = _parted(grad_last)
        sums = [zeros.clone() for _ in parameters]
        grad_current = zeros.clone() if held else torch.empty_like(membranes, dtype=current_dtype)
        grad_own = torch.zeros_like(grad_current) if need_own else None
        for t in range(len(membranes) - 1, -1, -1):
            before = tuple(states[t - 1] for states in kept) if t > 0 else first
            compared = membranes[t] if model.compared is None else model.compared(before, membranes[t], used)
            through_spike = slope(compared).mul_(grad_spikes[t])
            sums[-1] -= through_spike
            grads = (*grads, through_spike) if model.at_once else (*grads[:-1], grads[-1] + through_spike)
            fired = before[-1] > theta
            if grad_own is not None and model.takes is not None:
                taken = grads[len(kept) - 1].masked_fill(~model.takes(before, fired, used, options.reset), 0)
                (grad_own if held else grad_own[t]).add_(taken)
            # without a state the spike before the first step is a constant
            of_spike = slope if t > 0 or state is not None else torch.zeros_like
            to_current, grads, added = model.charge_backward(grads, before, fired, of_spike, used, options.reset)
            if need_current and held:
                grad_current += to_current
            elif need_current:
                grad_current[t] = to_current
            for total, term in zip(sums, added, strict=True):
                if term is not None:
                    total += term
        return (
            grad_current.to(current_dtype) if need_current else None,
            _joined(grads).to(state.dtype) if need_state else None,
            None if grad_own is None else grad_own.to(current_dtype),
            None,
            None,
            None,
            None,
            *(
                _as_parameter(total, parameter, name in model.decays) if needed else None
                for name, total, parameter, needed in zip(
                    model.parameters, sums, parameters, need_parameters, strict=True
                )
            ),
        )


class _Edge(torch.autograd.Function):
    """Zeros of a tensor's shape that take no memory, and have its gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.new_zeros(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad


def _again(ctx, edges, state, kept, parameters, grads):
    """The gradients by plain operations. The states are known, so that the currents, in which they are linear, are not
    needed: only where their gradients go."""
    (edge, own_edge), (steps, options, current_dtype) = edges, ctx.call
    if edge is None:
        edge = kept[-1].new_zeros((), dtype=current_dtype).expand(kept[-1].shape[0 if steps is None else 1 :])

    def run(current, before, to_membrane, *own):
        return in_steps(current, replaced(options, parameters=own), steps, before, kept, to_membrane)

    needed = *ctx.needs_input_grad[:3], *ctx.needs_input_grad[7:]
    found = gradients_of(run, (edge, state, own_edge, *parameters), grads, needed, autocast_of(edge))
    return *found[:3], None, None, None, None, *found[3:]


def _as_parameter(total: torch.Tensor, parameter: torch.Tensor, clamped: bool) -> torch.Tensor:
    """The gradient of a scalar or per-neuron parameter from each neuron's and sample's contribution."""
    grad = total.sum_to_size((total.shape[-1],) if parameter.numel() > 1 else (1,))
    if clamped:
        grad = grad.masked_fill((parameter <= 0) | (parameter >= 1), 0)  # the clamp's own derivative, 0 at its bounds
    return grad.reshape(parameter.shape).to(parameter.dtype)
