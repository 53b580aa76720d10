"""SpikingJelly 2 in multi-step mode: dense linear layers over all time steps at once, then its LIF over all of them.

Its mathematics is as close to g2g's as ``LIFNode`` allows (``decay_input=False``, soft reset, ``detach_reset=True``,
ATan with α = 2, τ = 1/(1 − β), the workload's θ). What differs:

- a soft reset subtracts θ before the membrane decays, U_t = β·(U_{t−1} − θ·R_t) + I_t, while snnTorch and g2g
  subtract it afterwards; so its numbers are checked against the reference with that formula;
- a neuron fires at U ≥ θ, not only above it (they differ on a set that no float hits but by chance);
- τ and θ are Python numbers: there are no gradients of β and θ, so it does less work than the others
  (``ParametricLIFNode`` learns τ, nothing learns θ);
- on a CPU its multi-step LIF is a loop of PyTorch operations under autograd; CUDA gets its fused kernels, which need
float32 membranes. That is why the function behind ``LIFNode(step_mode="m")`` is called with a float32
  state here: the module itself would keep its state in bfloat16 under autocast, and leave the fused kernel.

The input is the same at every step, so ``fc1`` is computed once and expanded without a copy.
"""

import functools
import logging
from typing import Any

import torch
from torch import nn

from ..contender import LayerByLayer, NetworkContender, NeuronContender, dense_linear
from ..workload import Prepared

logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # importing it without Triton warns twice

from spikingjelly.activation_based import functional, layer, surrogate  # noqa: E402  (see above)

PEERS = (("spikingjelly-dense", "MultiStep", ("step", "forward")), ("spikingjelly", "Neurons", ("lif",)))
NEEDS = ("spikingjelly",)

LIF_GRADIENTS = tuple(f"lif{number}.{name}" for number in (1, 2, 3) for name in ("beta", "threshold"))


def _options(beta: float, threshold: float) -> dict[str, Any]:
    if not 0 < beta < 1:
        raise ValueError(f"SpikingJelly's τ = 1/(1 − β) has to be above 1 and finite, which β = {beta} does not give")
    options = {"tau": 1 / (1 - beta), "v_threshold": threshold, "surrogate_function": surrogate.ATan(alpha=2.0)}
    return {**options, "decay_input": False, "v_reset": None, "detach_reset": True}


class _MultiStepLIF(nn.Module):
    """What ``LIFNode(step_mode="m")`` computes, with a float32 state whatever the dtype of its input."""

    def __init__(self, beta: torch.Tensor, threshold: torch.Tensor) -> None:
        super().__init__()
        self.options = _options(beta.item(), threshold.item())

    def forward(self, current: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        current = current if steps is None else current.expand(steps, -1, -1)
        state = torch.zeros(current.shape[1:], dtype=torch.float32, device=current.device)
        spikes, _, _ = functional.lif_multi_step(current, state, **self.options)
        return spikes


class MultiStep(NetworkContender):
    """The network with dense weights: those outside the mask start at zero and are trained like the rest."""

    reset = "before decay"
    masked = False
    omits = LIF_GRADIENTS
    differs = (
        "resets before the decay and is checked against that; no gradients of β and θ; trains the absent weights too"
    )

    def build(self, prepared: Prepared) -> nn.Module:
        linear = functools.partial(dense_linear, kind=layer.Linear, step_mode="m")
        return LayerByLayer(prepared, linear, lambda ours: _MultiStepLIF(**ours.by_name))


class Neurons(NeuronContender):
    """Its multi-step LIF alone."""

    reset = "before decay"
    omits = ("beta", "threshold")
    differs = "resets before the decay and is checked against that; no gradients of β and θ"

    def make(self, prepared: Prepared) -> None:
        super().make(prepared)
        self.neurons = _MultiStepLIF(**self.parameters)

    def run(self) -> torch.Tensor:
        spikes = self.neurons(self.current)
        spikes.backward(self.grad_spikes)
        return spikes
