"""The neuron models: names, parameters, states, and one step forward and backward in PyTorch. Triton
(``g2g_kernels/triton/neuron.py``) and C++ (``csrc/neurons.h``) have the two functions, too; everything else loops over
these declarations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE
from g2g_kernels.ops.record import Expected
from g2g_kernels.tracing import replaced

RESETS = ("subtract", "zero", "none")
#: the default
RESET = "subtract"

Tensors = tuple[torch.Tensor, ...]
#: a membrane's spike, or the surrogate's derivative there
OfMembrane = Callable[[torch.Tensor], torch.Tensor]
#: the gradients of the current, of the states before the step, and of the parameters
StepGradients = tuple[torch.Tensor, Tensors, tuple[torch.Tensor | None, ...]]


class NeuronModel(NamedTuple):
    """A kind of neuron that spikes when its membrane exceeds its threshold.

    Attributes:
        name: what ``Neurons.model`` calls it.
        parameters: the names of its parameters in order, decays first; the last is ``"threshold"``.
        decays: the names of the parameters that are clamped to 0 … 1.
        states: the names of its state variables, initially 0; the last is the membrane.
        charge: ``(states, fired, spike, current, parameters, reset) -> states`` after one more step. ``fired`` is R_t,
            bool; decays among ``parameters`` are already clamped. ``spike(U)`` is S = 1[U > θ] as a number, with the
            surrogate's gradient, for a model whose step depends on S_{t−1} by more than the reset.
        charge_backward: ``(grads, states, fired, slope, parameters, reset) -> (current, states, parameters)``: from the
            gradients of the states after the step, the gradients of the current, of the ``states`` before it, and this
            step's part of those of the parameters (None: nothing). No gradient passes through R. ``slope(U)`` is
            σ'(U − θ): what reaches S_{t−1} goes on to U_{t−1}, and negated to θ, times ``slope(U_{t−1})``.
        compared: ``(states, membrane, parameters) -> membrane`` that a step from these ``states`` to this ``membrane``
            compares with the threshold; None: the one after the step. Where it is not None spikes do not follow from
            the membrane alone, and ``fired`` means nothing to the model.
        at_once: whether it is reset in the step of its spike: what arrives in a step acts on the spikes of later ones.
            ``grads`` then end with the gradient of the membrane that is compared, after those of the states.
        takes: ``(states, fired, parameters, reset) -> bool`` where the membrane takes a current of its own in a step
            from these ``states``, for a model whose ``current`` goes to another state; None: it goes to the membrane.
        fixed: the names of parameters that have no gradient.
        by_spikes: the names of parameters that only multiply spikes.
        event_gradients: whether ∂L/∂I_t = σ'(U_t − θ)·∂L/∂S_t + p·∂L/∂I_{t+1}, p the first parameter (reset ``"zero"``
            aside), so that the input gradient may be computed by events.
    """

    name: str
    parameters: tuple[str, ...]
    decays: tuple[str, ...]
    states: tuple[str, ...]
    charge: Callable[[Tensors, torch.Tensor, OfMembrane, torch.Tensor, Tensors, str], Tensors]
    charge_backward: Callable[[Tensors, Tensors, torch.Tensor, OfMembrane, Tensors, str], StepGradients]
    compared: Callable[[Tensors, torch.Tensor, Tensors], torch.Tensor] | None = None
    at_once: bool = False
    takes: Callable[[Tensors, torch.Tensor, Tensors, str], torch.Tensor] | None = None
    fixed: tuple[str, ...] = ()
    by_spikes: tuple[str, ...] = ()
    event_gradients: bool = False


# The order of operations of `lif` and `synaptic` is snnTorch's, so that float32 membranes are equal to the last bit. A
# reset selects and does not multiply: 0·∞ would be NaN, at an infinite threshold or after an infinite current.


def _unless(fired: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value``, or 0 where ``fired``."""
    return value.masked_fill(fired, 0)


def _lif_charge(
    states: Tensors, fired: torch.Tensor, spike: OfMembrane, current: torch.Tensor, parameters: Tensors, reset: str
) -> Tensors:
    (membrane,), (beta, theta) = states, parameters
    if reset == "zero":
        membrane = _unless(fired, membrane)
    membrane = membrane * beta + current
    return (torch.where(fired, membrane - theta, membrane) if reset == "subtract" else membrane,)


def _lif_charge_backward(
    grads: Tensors, states: Tensors, fired: torch.Tensor, slope: OfMembrane, parameters: Tensors, reset: str
) -> StepGradients:
    (grad,), (membrane,), (beta, _) = grads, states, parameters
    before = grad * beta
    if reset == "zero":
        membrane, before = _unless(fired, membrane), _unless(fired, before)
    return grad, (before,), (grad * membrane, -_unless(~fired, grad) if reset == "subtract" else None)


def _synaptic_charge(
    states: Tensors, fired: torch.Tensor, spike: OfMembrane, current: torch.Tensor, parameters: Tensors, reset: str
) -> Tensors:
    (synaptic_current, membrane), (syn_decay, beta, theta) = states, parameters
    synaptic_current = synaptic_current * syn_decay + current
    membrane = membrane * beta + synaptic_current
    if reset == "subtract":
        membrane = torch.where(fired, membrane - theta, membrane)
    elif reset == "zero":
        membrane = _unless(fired, membrane)
    return synaptic_current, membrane


def _synaptic_charge_backward(
    grads: Tensors, states: Tensors, fired: torch.Tensor, slope: OfMembrane, parameters: Tensors, reset: str
) -> StepGradients:
    (to_current, to_membrane), (synaptic_current, membrane), (syn_decay, beta, _) = grads, states, parameters
    if reset == "zero":
        to_membrane = _unless(fired, to_membrane)
    to_current = to_current + to_membrane
    to_theta = -_unless(~fired, to_membrane) if reset == "subtract" else None
    before = to_current * syn_decay, to_membrane * beta
    return to_current, before, (to_current * synaptic_current, to_membrane * membrane, to_theta)


def _synaptic_takes(states: Tensors, fired: torch.Tensor, parameters: Tensors, reset: str) -> torch.Tensor:
    return ~fired if reset == "zero" else torch.ones_like(fired)


def _adlif_charge(
    states: Tensors, fired: torch.Tensor, spike: OfMembrane, current: torch.Tensor, parameters: Tensors, reset: str
) -> Tensors:
    (adaptation, membrane), (adapt_decay, beta, a, b, theta) = states, parameters
    spikes = spike(membrane)
    if reset == "zero":
        membrane = _unless(fired, membrane)
    adaptation = adaptation * adapt_decay + membrane * a + spikes * b
    membrane = membrane * beta + current - adaptation
    return adaptation, torch.where(fired, membrane - theta, membrane) if reset == "subtract" else membrane


def _adlif_charge_backward(
    grads: Tensors, states: Tensors, fired: torch.Tensor, slope: OfMembrane, parameters: Tensors, reset: str
) -> StepGradients:
    (to_adaptation, to_membrane), (adaptation, membrane), (adapt_decay, beta, a, b, _) = grads, states, parameters
    to_adaptation = to_adaptation - to_membrane
    through_spike = slope(membrane) * (to_adaptation * b)
    before = to_membrane * beta + to_adaptation * a
    to_theta = -through_spike
    if reset == "subtract":
        to_theta = to_theta - _unless(~fired, to_membrane)
    if reset == "zero":
        membrane, before = _unless(fired, membrane), _unless(fired, before)
    to_parameters = (
        to_adaptation * adaptation,
        to_membrane * membrane,
        to_adaptation * membrane,
        to_adaptation * fired,
        to_theta,
    )
    return to_membrane, (to_adaptation * adapt_decay, before + through_spike), to_parameters


def exact_gain(syn_decay: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """What a synaptic current of 1 adds in one step to the membrane of ``cubalif`` neurons with these decays α and β:

        c = (β − α)·ln β / (ln α − ln β) = −ln β·√(αβ)·sinh(x)/x,    x = (ln α − ln β)/2

    with sinh(x)/x by its series near x = 0; differentiable (Rotter and Diesmann 1999, exact integration)."""
    syn_decay, beta = clamped(syn_decay), clamped(beta)
    least = torch.finfo(beta.dtype).tiny
    of_current, of_membrane = syn_decay.clamp(min=least).log(), beta.clamp(min=least).log()
    x = (of_current - of_membrane) / 2
    near = x.abs() < 0.5
    square = torch.where(near, x * x, 0)
    series = torch.ones_like(x)
    for n in (14, 12, 10, 8, 6, 4, 2):
        series = 1 + series * square / (n * (n + 1))
    far = torch.where(near, 1, x)
    gain = -of_membrane * ((of_current + of_membrane) / 2).exp() * torch.where(near, series, far.sinh() / far)
    return torch.where(beta > 0, gain, syn_decay).masked_fill(syn_decay <= 0, 0)


def clamped(decay: torch.Tensor) -> torch.Tensor:
    """clamp(decay, 0, 1), without a slope at 0 and 1 themselves, where torch.clamp has one before PyTorch 2.15."""
    return torch.where((decay <= 0) | (decay >= 1), decay.detach().clamp(0, 1), decay)


# Where a neuron is refractory, −∞ is compared with the threshold: no spike, and the slope of every surrogate is 0.


def _cubalif_compared(states: Tensors, after: torch.Tensor, parameters: Tensors) -> torch.Tensor:
    (waiting, synaptic_current, membrane), (_, beta, gain, *_) = states, parameters
    return (membrane * beta + synaptic_current * gain).masked_fill(waiting != 0, -torch.inf)


def _cubalif_takes(states: Tensors, fired: torch.Tensor, parameters: Tensors, reset: str) -> torch.Tensor:
    return (states[0] == 0) & ~(_cubalif_compared(states, states[-1], parameters) > parameters[-1])


def _cubalif_charge(
    states: Tensors, fired: torch.Tensor, spike: OfMembrane, current: torch.Tensor, parameters: Tensors, reset: str
) -> Tensors:
    waiting, synaptic_current, membrane = states
    syn_decay, beta, gain, refractory, reset_current, theta = parameters
    ready = waiting == 0
    membrane = torch.where(ready, membrane * beta + synaptic_current * gain, membrane)
    synaptic_current = torch.where(ready, synaptic_current * syn_decay, synaptic_current)
    fires = ready & (membrane > theta)
    waiting = torch.where(fires, refractory.detach().clamp(min=1) - 1, (waiting.detach() - 1).clamp(min=0))
    synaptic_current = torch.where(ready & ~fires, synaptic_current + current, synaptic_current)
    synaptic_current = _unless(fires & (reset_current > 0), synaptic_current)
    if reset == "subtract":
        membrane = torch.where(fires, membrane - theta, membrane)
    elif reset == "zero":
        membrane = _unless(fires, membrane)
    return waiting, synaptic_current, membrane


def _cubalif_charge_backward(
    grads: Tensors, states: Tensors, fired: torch.Tensor, slope: OfMembrane, parameters: Tensors, reset: str
) -> StepGradients:
    (_, to_current, to_membrane, to_compared), (waiting, synaptic_current, membrane) = grads, states
    syn_decay, beta, gain, _, reset_current, theta = parameters
    ready = waiting == 0
    fires = ready & (membrane * beta + synaptic_current * gain > theta)
    to_theta = -_unless(~fires, to_membrane) if reset == "subtract" else None
    if reset == "zero":
        to_membrane = _unless(fires, to_membrane)
    to_membrane = to_membrane + to_compared
    to_input = _unless(~ready | fires, to_current)
    to_current = _unless(fires & (reset_current > 0), to_current)
    before = (
        torch.zeros_like(waiting),
        torch.where(ready, to_current * syn_decay + to_membrane * gain, to_current),
        torch.where(ready, to_membrane * beta, to_membrane),
    )
    of_ready = [
        _unless(~ready, each)
        for each in (to_current * synaptic_current, to_membrane * membrane, to_membrane * synaptic_current)
    ]
    return to_input, before, (*of_ready, None, None, to_theta)


MODELS = {
    model.name: model
    for model in (
        NeuronModel(
            "lif",
            ("beta", "threshold"),
            ("beta",),
            ("membrane",),
            _lif_charge,
            _lif_charge_backward,
            event_gradients=True,
        ),
        NeuronModel(
            "synaptic",
            ("syn_decay", "beta", "threshold"),
            ("syn_decay", "beta"),
            ("synaptic_current", "membrane"),
            _synaptic_charge,
            _synaptic_charge_backward,
            takes=_synaptic_takes,
        ),
        NeuronModel(
            "adlif",
            ("adapt_decay", "beta", "a", "b", "threshold"),
            ("adapt_decay", "beta"),
            ("adaptation", "membrane"),
            _adlif_charge,
            _adlif_charge_backward,
            by_spikes=("b",),
        ),
        NeuronModel(
            "cubalif",
            ("syn_decay", "beta", "gain", "refractory", "reset_current", "threshold"),
            ("syn_decay", "beta"),
            ("refractory_steps", "synaptic_current", "membrane"),
            _cubalif_charge,
            _cubalif_charge_backward,
            compared=_cubalif_compared,
            at_once=True,
            takes=_cubalif_takes,
            fixed=("refractory", "reset_current"),
        ),
    )
}


REFRACTORY = "refractory_"


class _LastStep(NamedTuple):
    """What refractory neurons know before a step from their states f, …, U: where S_{t−1} follows from the membrane
    (``knows``; elsewhere it is 0, since the step before was refractory); where it is 1 (``fired``); where this step is
    refractory (``waits``); and f after it (``left``)."""

    knows: torch.Tensor
    fired: torch.Tensor
    waits: torch.Tensor
    left: torch.Tensor

    @classmethod
    def of(cls, states: Tensors, parameters: Tensors) -> "_LastStep":
        left, period = states[0].detach(), parameters[-2].detach()
        knows = left == 0
        fired = knows & (states[-1] > parameters[-1])
        begins = fired & (period > 1)
        return cls(knows, fired, begins | (left > 1), torch.where(begins, period - 1, (left - 1).clamp(min=0)))


def refractory(model: NeuronModel) -> NeuronModel:
    """A model that resets one step after its spike, with a refractory period of R steps, its last parameter but one.

    The step after a spike, and those before which its first state f is 2 or more, are refractory, if R is: the membrane
    is reset, then held, nothing is compared, and the other states go on without current. f is R − 1 after the first of
    these steps and 1 after the last, so that it says of the step before whether it was one.
    """

    def inner(parameters: Tensors) -> Tensors:
        return *parameters[:-2], parameters[-1]

    def compared(states: Tensors, after: torch.Tensor, parameters: Tensors) -> torch.Tensor:
        return after.masked_fill(_LastStep.of(states, parameters).waits, -torch.inf)

    def takes(states: Tensors, fired: torch.Tensor, parameters: Tensors, reset: str) -> torch.Tensor:
        last = _LastStep.of(states, parameters)
        assert model.takes is not None
        return ~last.waits & model.takes(states[1:], last.fired, inner(parameters), reset)

    def charge(
        states: Tensors, fired: torch.Tensor, spike: OfMembrane, current: torch.Tensor, parameters: Tensors, reset: str
    ) -> Tensors:
        last, theta = _LastStep.of(states, parameters), parameters[-1]

        def known_spike(membrane: torch.Tensor) -> torch.Tensor:
            return spike(membrane.masked_fill(~last.knows, -torch.inf))

        current = _unless(last.waits, current)
        after = model.charge(states[1:], last.fired, known_spike, current, inner(parameters), reset)
        held = states[-1]
        if reset != "none":
            held = torch.where(last.fired, held - theta if reset == "subtract" else 0, held)
        return last.left, *after[:-1], torch.where(last.waits, held, after[-1])

    def charge_backward(
        grads: Tensors, states: Tensors, fired: torch.Tensor, slope: OfMembrane, parameters: Tensors, reset: str
    ) -> StepGradients:
        last = _LastStep.of(states, parameters)

        def known_slope(membrane: torch.Tensor) -> torch.Tensor:
            return _unless(~last.knows, slope(membrane))

        _, *others, to_membrane = grads
        held = _unless(~last.waits, to_membrane)
        free = *others, _unless(last.waits, to_membrane)
        to_current, (*before, to_before), (*to_parameters, to_theta) = model.charge_backward(
            free, states[1:], last.fired, known_slope, inner(parameters), reset
        )
        if reset == "subtract":
            assert to_theta is not None
            to_theta = to_theta - _unless(~last.fired, held)
        elif reset == "zero":
            held = _unless(last.fired, held)
        states_before = torch.zeros_like(states[0]), *before, to_before + held
        return _unless(last.waits, to_current), states_before, (*to_parameters, None, to_theta)

    return NeuronModel(
        f"{REFRACTORY}{model.name}",
        (*model.parameters[:-1], "refractory", "threshold"),
        model.decays,
        ("refractory_steps", *model.states),
        charge,
        charge_backward,
        compared=compared,
        takes=None if model.takes is None else takes,
        fixed=("refractory",),
        by_spikes=model.by_spikes,
    )


MODELS |= {each.name: each for each in [refractory(MODELS[name]) for name in ("lif", "synaptic", "adlif")]}


class Neurons(NamedTuple):
    """A population of neurons in the operators' form.

    Attributes:
        model: ``"lif"``, ``"synaptic"``, ``"adlif"`` or ``"cubalif"``, or one of the first three with a refractory
            period, as ``"refractory_lif"``: a name in ``MODELS``.
        parameters: in the model's order, each a number, or a tensor of one entry or [N].
        reset: ``"subtract"``, ``"zero"`` or ``"none"``.
        surrogate: the stand-in for dS/dU, a name in ``SURROGATES``.
        alpha: the sharpness α of the surrogate, above 0.

    Example:
        >>> population = Neurons("lif", (torch.tensor([0.9]), torch.tensor([1.0])))  # beta and threshold, one for all
        >>> neurons(torch.full((3, 1, 4), 0.6), population)[:, 0, 0]
        tensor([0., 1., 0.])
    """

    model: str
    parameters: tuple[Any, ...]
    reset: str = RESET
    surrogate: str = SURROGATE
    alpha: float = ALPHA

    def expected(self, size: int, of: str = "") -> Expected:
        """What kernels take for granted of the parameters (``of`` some population): one entry, or ``size``."""
        for name, parameter in zip(MODELS[self.model].parameters, self.parameters, strict=True):
            yield f"{name}{of}", parameter, parameter.shape if parameter.numel() == 1 else (size,), torch.float32

    def integrating(self) -> "Neurons":
        """The population whose membranes are those of neurons that do not spike."""
        model = MODELS[self.model]
        values = dict.fromkeys(model.by_spikes, 0.0)
        if model.compared is not None:  # a spike does more than a reset
            values["threshold"] = torch.inf
        parameters = tuple(
            torch.full_like(parameter, values[name]) if name in values else parameter
            for name, parameter in zip(model.parameters, self.parameters, strict=True)
        )
        return replaced(self, parameters=parameters, reset="none")
