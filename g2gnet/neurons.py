"""Populations of spiking neurons as modules. The model declares the parameters and states of each."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from g2g_kernels import Neurons, neurons, neurons_step
from g2g_kernels.choices import check_choice, check_flag
from g2g_kernels.numbers import SHARPNESS, SIZE, Number
from g2g_kernels.ops.g2g_stack import NeuronState
from g2g_kernels.ops.neurons import MODELS
from g2g_kernels.ops.neurons.checks import check_parameter
from g2g_kernels.ops.neurons.models import REFRACTORY, RESET, RESETS, NeuronModel, exact_gain
from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE, SURROGATES
from g2g_kernels.tracing import default_device, is_observed


class SpikingNeurons(nn.Module):
    """A population of neurons, run over all time steps at once (:func:`g2g_kernels.neurons`): base of one class per
    model, which gives the initial values of its parameters.

    Args:
        neurons: None for one value of each parameter, [1], shared by the layer; a number N for one per neuron.
        reset, surrogate, alpha, backend: as for :func:`g2g_kernels.lif`.
        refractory: the refractory period R, one number or [N]: in the unit of ``dt`` where that is given, rounded to
            whole steps, else in steps. After a spike in t the step t + 1 applies the reset alone, and until step t + R
            the membrane stays, there is no spike, and what arrives is lost; synaptic currents and adaptation go on
            without it. R ≤ 1 changes nothing. Kept in steps, as a buffer, where it is not 0 (``CubaLIF``: always).
        dt: the length of a step, in the unit of the time constants and of ``refractory``.
        parameters: by name, the initial values of the model's parameters (``beta=0.95``; a tensor [N] with N
            ``neurons``), and whether they are learned (``learn_beta=False`` makes it a buffer). In place of a decay a
            time constant above 0, with ``dt``: ``tau`` for ``beta``, ``tau_syn`` for ``syn_decay`` and ``tau_adapt``
            for ``adapt_decay``. The decay is exp(−dt/τ).

    Raises:
        ValueError: for a number that a float32 cannot hold, a tensor of another shape, an α that is not above 0, an
            unknown reset or surrogate; for a refractory period below 0 or above 2²⁰ steps, or of no whole number of
            steps without ``dt``.
        TypeError: for an unknown parameter, a time constant without ``dt``, or ``dt`` without anything in its unit.

    Example:
        >>> from g2gnet import LIF, Synaptic
        >>> Synaptic().model.name, [name for name, _ in LIF().named_parameters()]
        ('synaptic', ['beta', 'threshold'])
    """

    model: ClassVar[NeuronModel]
    refractory: torch.Tensor | None
    #: the initial value of each parameter; the model has others only if they follow from these, or are options
    initial: ClassVar[dict[str, float]]

    def __init__(
        self,
        neurons: int | None = None,
        *,
        reset: str = RESET,
        surrogate: str = SURROGATE,
        alpha: float = ALPHA,
        backend: str | None = None,
        refractory: Any = 0,
        dt: float | None = None,
        **parameters: float | torch.Tensor,
    ) -> None:
        super().__init__()
        self.reset = check_choice("reset", reset, RESETS)
        self.surrogate = check_choice("surrogate", surrogate, SURROGATES)
        SHARPNESS.check("alpha", alpha)
        self.alpha = alpha
        self.backend = backend
        size = None if neurons is None else SIZE.check("neurons", neurons)
        for name, value in parameters.items():
            if isinstance(value, np.ndarray | list | tuple):
                parameters[name] = value = torch.as_tensor(value)
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != (size,):
                wanted = "one number, or give the number of neurons first," if size is None else f"[{size}]"
                raise ValueError(f"{name} is a tensor {list(value.shape)}; give {wanted} as LIF({size or 'N'}, …)")
        period = _steps(refractory, size, dt)
        own_period = "refractory" in type(self).model.parameters
        if dt is not None and not parameters.keys() & TIME_CONSTANTS and not (own_period or period.any()):
            names = ", ".join([*TIME_CONSTANTS, "refractory"])
            raise TypeError(f"dt={dt!r:.40} is the step of {names}; give one of these, or no dt")
        for name, decay in TIME_CONSTANTS.items():
            if decay in self.initial and name in parameters:
                if decay in parameters:
                    raise TypeError(f"{name} and {decay} are the same parameter; give one of them")
                parameters[decay] = _decay(name, parameters.pop(name), dt)
        for name, usual in self.initial.items():
            tensor = _initial(name, parameters.pop(name, usual), size)
            if check_flag(f"learn_{name}", parameters.pop(f"learn_{name}", True)):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        kept = own_period or bool(period.any())
        self.register_buffer("refractory", period.to(tensor) if kept else None)
        if parameters:
            raise TypeError(
                f"{', '.join(parameters)}: unknown to {self.model.name} neurons, which have {', '.join(self.initial)}"
            )

    @property
    def by_name(self) -> dict[str, torch.Tensor]:
        """The parameters by name, in the order of ``initial``, each [1] or [N]."""
        # of the type: from an instance, torch.export of PyTorch 2.6 takes only numbers and strings of its class
        return {name: getattr(self, name) for name in type(self).initial}

    @property
    def model_name(self) -> str:
        """The name of the model that operators run, which is another one with a ``refractory`` period."""
        model = type(self).model
        waits = self.refractory is not None and "refractory" not in model.parameters
        return f"{REFRACTORY}{model.name}" if waits else model.name

    @property
    def population(self) -> Neurons:
        """These neurons as operators take them."""
        kind = self.model_name
        parameters: tuple[torch.Tensor, ...] = ()
        for name in MODELS[kind].parameters:
            parameters = *parameters, getattr(self, name)
        return Neurons(kind, parameters, self.reset, self.surrogate, self.alpha)

    def forward(self, current: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        """Currents [T, ..., N], or one current [..., N] held for ``steps`` steps → spikes [T, ..., N]."""
        return neurons(current, self.population, steps, self.backend)

    def step(
        self, current: torch.Tensor, state: NeuronState | None = None, to_membrane: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, NeuronState]:
        """One time step (:func:`g2g_kernels.neurons_step`), for online input and recurrent networks: from a current
        [..., N], what the last step returned (None at the first), and a current of the same shape onto the membrane, if
        there is one, to spikes [..., N] and the state."""
        states = (state,) if isinstance(state, torch.Tensor) else state
        spikes, states = neurons_step(current, states, self.population, to_membrane)
        return spikes, states[0] if len(states) == 1 else states

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self.initial:
            saved = state_dict.get(prefix + name)
            if isinstance(saved, torch.Tensor) and saved.shape == ():  # as snnTorch saves it
                state_dict[prefix + name] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"reset={self.reset!r}, surrogate={self.surrogate!r}, alpha={self.alpha}"


_POSITIVE = Number(0, open_low=True)
#: the time constants that may be given in place of decays
TIME_CONSTANTS = {"tau": "beta", "tau_syn": "syn_decay", "tau_adapt": "adapt_decay"}


def _decay(name: str, constant: Any, dt: float | None) -> float | torch.Tensor:
    """The decay in a step of a time constant, or of one for each neuron."""
    if dt is None:
        raise TypeError(f"{name}={constant!r:.40} needs dt, a step in the same unit, as {name}=20.0, dt=1.0")
    dt = _POSITIVE.check("dt", dt)
    if not isinstance(constant, torch.Tensor) or not constant.dim():
        return math.exp(-dt / _POSITIVE.check(name, constant))
    for each in constant.detach().unique().tolist():
        _POSITIVE.check(name, each)
    return torch.exp(-dt / constant.detach().double())


#: refractory steps, which a float32 counts
_STEPS = Number(0, 1 << 20)


def _steps(refractory: Any, size: int | None, dt: float | None) -> torch.Tensor:
    """The steps of a refractory period, [1] or [N]. Raises ValueError for one that is no whole number from 0 to 2²⁰."""
    steps = torch.as_tensor(refractory, dtype=torch.float64, device="cpu").detach()
    if steps.dim() and steps.shape != (size,):
        wanted = "one number, or give the number of neurons first" if size is None else f"[{size}]"
        raise ValueError(f"refractory is a tensor {list(steps.shape)}; give {wanted}")
    steps = steps if dt is None else (steps / _POSITIVE.check("dt", dt)).round()
    for each in steps.reshape(-1).unique().tolist():
        if _STEPS.check("refractory, in steps,", each) != round(each):
            raise ValueError(f"refractory={each} is no whole number of steps; give dt, a step in the same unit")
    return steps.reshape(-1).expand(1 if size is None else size).clone()


def _initial(name: str, value: Any, size: int | None) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.dim():
        # FSDP2 shards no parameter without dimensions
        return torch.full((size or 1,), check_parameter(name, value))
    for each in value.detach().unique().tolist():
        check_parameter(name, each)
    return value.detach().to(default_device(), torch.float32).clone()


class LIF(SpikingNeurons):
    """Leaky integrate-and-fire neurons (:func:`g2g_kernels.lif`), snnTorch's ``Leaky``: ``beta`` and ``threshold``.

    Example:
        >>> neurons = LIF(beta=0.9)
        >>> neurons(torch.rand(20, 2, 64)).shape  # currents over time [T, B, N] -> spikes
        torch.Size([20, 2, 64])
    """

    model = MODELS["lif"]
    initial: ClassVar = {"beta": 0.9, "threshold": 1.0}
    beta: torch.Tensor
    threshold: torch.Tensor


class Synaptic(SpikingNeurons):
    """LIF neurons with a synaptic current (:func:`g2g_kernels.synaptic`), snnTorch's ``Synaptic``: ``syn_decay``,
    ``beta`` and ``threshold``. Initially the current lasts 1/(1 − γ) = 5 steps (γ = 0.8), half as long as the membrane.

    Example:
        >>> neurons = Synaptic(64, syn_decay=0.8)  # a decay, a leak and a threshold for each of 64 neurons
        >>> neurons(torch.rand(20, 2, 64)).shape
        torch.Size([20, 2, 64])
    """

    model = MODELS["synaptic"]
    initial: ClassVar = {"syn_decay": 0.8, "beta": 0.9, "threshold": 1.0}
    syn_decay: torch.Tensor
    beta: torch.Tensor
    threshold: torch.Tensor


class AdLIF(SpikingNeurons):
    """Adaptive LIF neurons (:func:`g2g_kernels.adlif`): ``adapt_decay``, ``beta``, ``a``, ``b`` and ``threshold``.
    Initially the adaptation lasts 1/(1 − ρ) = 20 steps (ρ = 0.95), twice as long as the membrane.

    Example:
        >>> neurons = AdLIF(64, b=0.3)  # a spike makes the next one of the same neuron harder
        >>> neurons(torch.rand(20, 2, 64)).shape
        torch.Size([20, 2, 64])
    """

    model = MODELS["adlif"]
    initial: ClassVar = {"adapt_decay": 0.95, "beta": 0.9, "a": 0.05, "b": 0.1, "threshold": 1.0}
    adapt_decay: torch.Tensor
    beta: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    threshold: torch.Tensor

    @torch.no_grad()
    def keep_stable_(self) -> None:
        """Moves a learned ``a`` to where silent neurons stay silent: −(1 − ρ)(1 − β) ≤ a ≤ (1 + ρ)(1 + β).

        Without spikes and currents a step multiplies (w, U) by a matrix of determinant ρβ and trace ρ + β − a, whose
        eigenvalues are at most 1 in absolute value within these bounds (Jury 1964). Beyond them membranes and gradients
        grow exponentially with T. :mod:`g2gnet.training` calls this after each update.
        """
        if not isinstance(self.a, nn.Parameter):
            return
        rho, beta = self.adapt_decay.clamp(0, 1), self.beta.clamp(0, 1)
        low, high = -(1 - rho) * (1 - beta), (1 + rho) * (1 + beta)
        if self.a.numel() == 1:
            low, high = low.max(), high.min()
        self.a.clamp_(low, high)


class CubaLIF(SpikingNeurons):
    """Current-based LIF neurons with exponential synapses (:func:`g2g_kernels.cubalif`), integrated exactly and in
    Brian2's order: ``syn_decay``, ``beta`` and ``threshold``.

    What arrives in a step acts on the spikes of later steps. ``activity.membranes`` are those after the reset. The
    state of a network also has what these neurons sent last, where a delay reads it.

    Args:
        reset: as for :func:`g2g_kernels.cubalif`.
        reset_current: whether a spike sets the synaptic current to 0, too. A buffer.
        neurons, options: as for :class:`SpikingNeurons`, ``refractory`` and the errors too.

    Example:
        >>> neurons = CubaLIF(tau=20.0, tau_syn=5.0, dt=0.1, threshold=7.0, refractory=2.2)  # ms, mV
        >>> neurons(torch.rand(20, 2, 64)).shape
        torch.Size([20, 2, 64])
        >>> neurons.refractory
        tensor([22.])
    """

    model = MODELS["cubalif"]
    initial: ClassVar = {"syn_decay": 0.8, "beta": 0.9, "threshold": 1.0}
    syn_decay: torch.Tensor
    beta: torch.Tensor
    threshold: torch.Tensor
    reset_current: torch.Tensor
    #: the decays of the last :attr:`gain` without a gradient, and that gain
    _gain: tuple[torch.Tensor, ...] = ()

    def __init__(
        self, neurons: int | None = None, *, reset: str = "zero", reset_current: bool = False, **options: Any
    ) -> None:
        super().__init__(neurons, reset=reset, **options)
        at_spike = float(check_flag("reset_current", reset_current))
        self.register_buffer("reset_current", torch.full((1,), at_spike))

    @property
    def gain(self) -> torch.Tensor:
        """What a synaptic current of 1 adds to the membrane in a step, [1] or [N]."""
        decays = self.syn_decay, self.beta
        if is_observed(decays) or (torch.is_grad_enabled() and any([each.requires_grad for each in decays])):
            return exact_gain(*decays)
        if not (kept := self._gain) or not all(map(_equal, decays, kept)):
            with torch.inference_mode(False):  # a later call may need a gradient
                of = [each.detach().clone() for each in decays]
                self._gain = kept = *of, exact_gain(*of)
        return kept[2]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors have the same numbers, dtype and device."""
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


#: the class of each model
NEURONS: dict[str, type[SpikingNeurons]] = {kind.model.name: kind for kind in (LIF, Synaptic, AdLIF, CubaLIF)}
