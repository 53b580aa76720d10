"""The same network as people write it with snnTorch: a Python loop over time steps.

The neurons are ``snntorch.Leaky`` with learnable β and θ, reset by subtraction and the ATan surrogate: exactly
g2g's formula. All three products are inside the loop, as in snnTorch's tutorials (``fc1`` too, although its input is
constant). The masked loop adds ``weight * mask`` at every step, the usual way to train sparse layers where a library
has none. The neurons of a recurrent layer are ``RLeaky`` with ``all_to_all``, its recurrent weights ours and without a
bias, which the layer below has.

Improvements for the peer beyond the tutorials: membranes in float32 under bfloat16 autocast, spike counts accumulated
instead of stacked, fused Adam, and for the neurons alone no stacking of spikes before the backward pass.
"""

import snntorch
import torch
from torch import nn

from ..contender import Kept, NetworkContender, NeuronContender, dense_linear, keep, masked_linear
from ..workload import Prepared

PEERS = (
    ("snntorch-masked", "MaskedLoop", ("step", "forward", "recurrent")),
    ("snntorch-dense", "DenseLoop", ("step", "forward", "recurrent")),
    ("snntorch", "Neurons", ("lif",)),
    ("snntorch", "SynapticNeurons", ("synaptic",)),
)
NEEDS = ("snntorch",)
#: g2g's default neurons as snnTorch has them
DEFAULT = {
    "spike_grad": snntorch.surrogate.atan(alpha=2.0),
    "learn_beta": True,
    "learn_threshold": True,
    "reset_mechanism": "subtract",
}


def leaky(
    beta: torch.Tensor, threshold: torch.Tensor, recurrent: nn.Linear | None = None
) -> snntorch.Leaky | snntorch.RLeaky:
    """Such neurons, joined to one another by ``recurrent``."""
    options = {"beta": beta.detach().clone(), "threshold": threshold.detach().clone(), **DEFAULT}
    if recurrent is None:
        neurons = snntorch.Leaky(**options)
    else:
        neurons = snntorch.RLeaky(all_to_all=True, linear_features=recurrent.in_features, **options)
        neurons.recurrent = recurrent
    snntorch.SpikingNeuron.init()  # remove it from the library's list of all neurons, which would keep it forever
    return neurons


class Loop(nn.Module):
    """The network; ``masked`` multiplies weights by their mask at every step."""

    def __init__(self, prepared: Prepared, masked: bool) -> None:
        super().__init__()
        self.steps = prepared.workload.T
        linear = masked_linear if masked else dense_linear
        net = prepared.network("torch")
        for number, ((connection, neurons), joined) in enumerate(zip(net.layers(), net.recurrents(), strict=True), 1):
            self.add_module(f"fc{number}", linear(connection))
            recurrent = None if joined is None else linear(joined)
            if recurrent is not None:
                self.add_module(f"rec{number}", recurrent)
            self.add_module(f"lif{number}", leaky(**neurons.by_name, recurrent=recurrent))

    def forward(self, images: torch.Tensor, kept: Kept | None = None) -> torch.Tensor:
        layers = [(getattr(self, f"fc{number}"), getattr(self, f"lif{number}")) for number in (1, 2, 3)]
        states = []  # of a recurrent layer spikes and membranes, of another membranes
        for fc, lif in layers:
            zero = torch.zeros(len(images), fc.out_features, device=images.device)
            states.append((zero, zero) if isinstance(lif, snntorch.RLeaky) else (zero,))
        counts = torch.zeros_like(zero)
        for _ in range(self.steps):
            spikes = images
            for index, (fc, lif) in enumerate(layers):
                spikes, membrane = lif(fc(spikes), *states[index])
                states[index] = (spikes, membrane)[-len(states[index]) :]
                keep(spikes, kept, index)
            counts = counts + spikes
        return counts


class MaskedLoop(NetworkContender):
    """The loop with dense weights times a mask."""

    def build(self, prepared: Prepared) -> nn.Module:
        return Loop(prepared, self.masked)


class DenseLoop(MaskedLoop):
    """The loop with dense weights: those outside the mask start at zero and are trained like the rest."""

    masked = False
    differs = "computes and trains the absent weights too"


class Neurons(NeuronContender):
    """``snntorch.Leaky`` in a loop over time steps."""

    def make(self, prepared: Prepared) -> None:
        super().make(prepared)
        self.neurons, self.parameters = self.made({name: each.detach() for name, each in self.parameters.items()})
        self.neurons.to(self.device)

    def made(self, values: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The neurons with these parameters, and their own ones, by the same names."""
        neurons = leaky(values["beta"], values["threshold"])
        return neurons, {"beta": neurons.beta, "threshold": neurons.threshold}

    def run(self) -> list[torch.Tensor]:
        states = [torch.zeros_like(self.current[0])] * (len(self.parameters) - 1)  # as many as decays
        spikes = []
        for current in self.current.unbind():
            spike, *states = self.neurons(current, *states)
            spikes.append(spike)
        torch.autograd.backward(spikes, list(self.grad_spikes.unbind()))
        return spikes


class SynapticNeurons(Neurons):
    """``snntorch.Synaptic`` in a loop over time steps."""

    def made(self, values: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        neurons = snntorch.Synaptic(alpha=values.pop("syn_decay"), learn_alpha=True, **values, **DEFAULT)
        snntorch.SpikingNeuron.init()
        return neurons, {"syn_decay": neurons.alpha, "beta": neurons.beta, "threshold": neurons.threshold}
