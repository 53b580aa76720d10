"""One time step of neurons in plain PyTorch, for loops that cannot run all steps at once: online input, recurrent
networks. Over a whole sequence :func:`g2g_kernels.lif`, :func:`g2g_kernels.synaptic` and :func:`g2g_kernels.adlif`
compute the same, faster and with less memory.
"""

import itertools
from collections.abc import Sequence

import torch

from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.neurons.checks import check_neurons, check_states
from g2g_kernels.ops.neurons.models import MODELS, RESET, Neurons, Tensors, clamped
from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE, SURROGATES
from g2g_kernels.tracing import is_transformed


def lif_step(
    current: torch.Tensor,
    membrane: torch.Tensor | None,
    beta: torch.Tensor | float,
    threshold: torch.Tensor | float,
    reset: str = RESET,
    surrogate: str = SURROGATE,
    alpha: float = ALPHA,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advances LIF neurons by one step; differentiable in ``current``, ``membrane``, ``beta`` and ``threshold``.

    Steps from t = 1 to T give the spikes of ``lif`` over all T to the last bit, and its gradients.

    Args:
        current: I_t [..., N].
        membrane: U_{t−1} [..., N] as the last step returned it; None at the first step, where it is 0.
        beta, threshold, reset, surrogate, alpha: as for :func:`g2g_kernels.lif`, and so are the errors.

    Returns:
        spikes S_t [..., N], 0 or 1 in the dtype of ``current``, and the membrane U_t [..., N], float32 for
        half-precision currents.

    Example:
        >>> membrane = None
        >>> for _ in range(3):
        ...     spikes, membrane = lif_step(torch.full((1, 1), 0.6), membrane, beta=0.9, threshold=1.0)
        ...     print(spikes.item())
        ...
        0.0
        1.0
        0.0
    """
    population = Neurons("lif", (beta, threshold), reset, surrogate, alpha)
    spikes, (membrane,) = neurons_step(current, None if membrane is None else (membrane,), population)
    return spikes, membrane


def synaptic_step(
    current: torch.Tensor,
    states: Tensors | None,
    syn_decay: torch.Tensor | float,
    beta: torch.Tensor | float,
    threshold: torch.Tensor | float,
    reset: str = RESET,
    surrogate: str = SURROGATE,
    alpha: float = ALPHA,
) -> tuple[torch.Tensor, Tensors]:
    """Advances synaptic neurons by one step; differentiable in everything that is a tensor.

    ``states`` are (C_{t−1}, U_{t−1}), each [..., N], as the last step returned them, and None at the first. The other
    arguments are those of :func:`lif_step` and :func:`g2g_kernels.synaptic`. Returns spikes S_t and (C_t, U_t).

    Example:
        >>> states = None
        >>> for _ in range(3):
        ...     spikes, states = synaptic_step(torch.full((1, 1), 0.4), states, syn_decay=0.8, beta=0.9, threshold=1.0)
        ...     print(spikes.item())
        ...
        0.0
        1.0
        0.0
    """
    population = Neurons("synaptic", (syn_decay, beta, threshold), reset, surrogate, alpha)
    return neurons_step(current, states, population)


def adlif_step(
    current: torch.Tensor,
    states: Tensors | None,
    adapt_decay: torch.Tensor | float,
    beta: torch.Tensor | float,
    a: torch.Tensor | float,
    b: torch.Tensor | float,
    threshold: torch.Tensor | float,
    reset: str = RESET,
    surrogate: str = SURROGATE,
    alpha: float = ALPHA,
) -> tuple[torch.Tensor, Tensors]:
    """Advances adaptive LIF neurons by one step; differentiable in everything that is a tensor.

    ``states`` are (w_{t−1}, U_{t−1}), each [..., N], as the last step returned them, and None at the first; the spike
    S_{t−1} = 1[U_{t−1} > θ] of given ones has the surrogate's gradient. The other arguments are those of
    :func:`lif_step` and :func:`g2g_kernels.adlif`. Returns spikes S_t and (w_t, U_t).

    Example:
        >>> adaptive = {"adapt_decay": 0.9, "beta": 0.9, "a": 0.0, "b": 0.5, "threshold": 1.0}
        >>> spikes, states = adlif_step(torch.full((1, 1), 0.6), None, **adaptive)
        >>> len(states)  # the adaptation and the membrane
        2
    """
    population = Neurons("adlif", (adapt_decay, beta, a, b, threshold), reset, surrogate, alpha)
    return neurons_step(current, states, population)


def neurons_step(
    current: torch.Tensor, states: Tensors | None, population: Neurons, to_membrane: torch.Tensor | None = None
) -> tuple[torch.Tensor, Tensors]:
    """Advances neurons of any model by one step; differentiable in the currents, the states and the parameters.

    ``to_membrane`` [..., N] is a second current, for the membrane, where the first one goes to a synaptic current.
    ``states`` are the model's, each [..., N], as the last step returned them, and None at the first: all 0. Returns
    spikes S_t [..., N], 0 or 1 in the dtype of ``current``, and the states, float32 for half-precision currents.

    Example:
        >>> population = Neurons("synaptic", (torch.tensor([0.8]), torch.tensor([0.9]), torch.tensor([1.0])))
        >>> spikes, states = neurons_step(torch.full((1, 1), 0.4), None, population)
        >>> len(states)  # the current and the membrane
        2
    """
    return _step(current, states, population, None, to_membrane)


def _step(
    current: torch.Tensor,
    states: Tensors | None,
    population: Neurons,
    known: Tensors | None,
    to_membrane: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Tensors]:
    """:func:`neurons_step`; if only derivatives are wanted, the states after it are ``known``."""
    check_tensor("current", current)
    if current.dim() < 1:
        raise ValueError(f"current has shape {tuple(current.shape)}; expected [..., N]")
    population = check_neurons("", population, current.shape[-1], current)
    model = MODELS[population.model]
    dtype = torch.promote_types(current.dtype, torch.float32)
    begins = states is None
    if states is None:
        states = tuple(torch.zeros_like(current, dtype=dtype) for _ in model.states)
    check_states(states, population, tuple(current.shape))
    parameters = tuple(
        clamped(parameter.to(dtype)) if name in model.decays else parameter.to(dtype)
        for name, parameter in zip(model.parameters, population.parameters, strict=True)
    )
    theta = parameters[-1]

    def spike(membrane: torch.Tensor) -> torch.Tensor:
        return _spikes(membrane, theta, population)

    def constant_spike(membrane: torch.Tensor) -> torch.Tensor:
        return (membrane > theta).to(dtype)

    fired = states[-1] > theta  # R_t: a comparison, so no gradient passes through it
    spike_before = constant_spike if begins else spike
    before, states = states, model.charge(states, fired, spike_before, current.to(dtype), parameters, population.reset)
    if to_membrane is not None and model.takes is not None:
        takes = model.takes(before, fired, parameters, population.reset)
        states = (*states[:-1], torch.where(takes, states[-1] + to_membrane.to(dtype), states[-1]))
    if known is not None:
        states = tuple([value + _rise(state) for value, state in zip(known, states, strict=True)])
    compared = states[-1] if model.compared is None else model.compared(before, states[-1], parameters)
    return spike(compared).to(current.dtype), states


def spikes_of(membrane: torch.Tensor, population: Neurons) -> torch.Tensor:
    """S = 1[U > θ] with its surrogate derivative, for membranes U [..., N] of a checked population."""
    return _spikes(membrane, population.parameters[-1].to(membrane.dtype), population)


def _spikes(membrane: torch.Tensor, theta: torch.Tensor, population: Neurons) -> torch.Tensor:
    spikes = (membrane > theta).to(membrane.dtype)
    # a trace must be the same with and without gradients
    if torch.is_grad_enabled() or is_transformed((membrane, theta)):
        spikes = spikes + _rise(SURROGATES[population.surrogate].primitive(membrane - theta, population.alpha))
    return spikes


def _rise(tensor: torch.Tensor) -> torch.Tensor:
    """0, with the derivative of ``tensor``."""
    rise = tensor - tensor.detach()
    return rise.masked_fill(rise.isnan(), 0)


def in_steps(
    current: torch.Tensor,
    population: Neurons,
    steps: int | None,
    state: torch.Tensor | None,
    known: Sequence[torch.Tensor] | None = None,
    to_membrane: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`g2g_kernels.ops.neurons.run_neurons` by single steps, in plain operations. If only derivatives are wanted,
    the values [T, ..., N] of each state are ``known``."""
    states: Tensors | None = None if state is None else state.unbind()
    spikes = []
    for t, current_t in enumerate(current.unbind() if steps is None else itertools.repeat(current, steps)):
        values = None if known is None else tuple([of_all_steps[t] for of_all_steps in known])
        own = to_membrane if to_membrane is None or steps is not None else to_membrane[t]
        spikes_t, states = _step(current_t, states, population, values, own)
        spikes.append(spikes_t)
    assert states is not None
    return torch.stack(spikes), torch.stack(states)
