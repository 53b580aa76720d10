"""Networks and stacks as small as tests can use them, and what they compute, in float64."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from helpers import seeded
from torch import nn

from g2g_kernels import BlockMask, GroupLayout, Neurons
from g2g_kernels.ops.neurons.models import MODELS, exact_gain
from g2g_kernels.ops.neurons.step import neurons_step
from g2gnet import LIF, CubaLIF, G2GLinear, G2GNet, SpikingNetwork, SpikingStack, Synaptic


def small_net(model: str = "mixer", seed: int = 0, sizes: Sequence[int] = (30, 40, 10), **options: Any) -> G2GNet:
    """A network with units of 4 and six steps, unless the options say otherwise."""
    return G2GNet(*sizes, model, generator=seeded(seed), **{"block_size": 4, "T": 6, **options})


def sparse_stack(
    sizes: Sequence[int], neurons: Sequence[nn.Module], steps: int, backend: str | None = None, *,
    recurrent: bool = False, gain: float = 1.0, unit: int = 4, groups: int = 3,
    kinds: tuple[str, str] = ("random", "index"), seed: int = 3, **options: Any,
) -> SpikingStack:  # fmt: skip
    """Sparse layers between populations of these sizes, all but the last recurrent if ``recurrent``; ``gain`` is a
    factor on all weights, ``kinds`` those of the groups of each layer's outputs and inputs."""
    draw, layers = seeded(seed), []
    for (below, size), of_layer in zip(itertools.pairwise(sizes), neurons, strict=True):
        out, into = GroupLayout(size, groups, kinds[0], draw), GroupLayout(below, groups, kinds[1])
        masks = [BlockMask.sample(out, side, 1, 0.4, unit, draw) for side in ([into, out] if recurrent else [into])]
        connection, *joined = (
            G2GLinear(mask, bias=number == 0, backend=backend, generator=draw) for number, mask in enumerate(masks)
        )
        layers.append((connection, of_layer, *joined))
    stack = SpikingStack([*layers[:-1], layers[-1][:2]], steps, backend, **options)
    for connection in stack.connections().values():
        connection.values.data *= gain
    return stack


def three_layers(backend: str | None = None, steps: int = 10, inputs: int = 12, **options: Any) -> SpikingStack:
    """LIF, synaptic and LIF neurons, with parameters per neuron and per layer, each reset, ragged units of 4."""
    neurons = (
        LIF(22, threshold=0.3, backend=backend),
        Synaptic(syn_decay=0.5, threshold=0.6, reset="zero", surrogate="triangle", alpha=0.7, backend=backend),
        LIF(reset="none", threshold=0.8, backend=backend),
    )
    kinds = ("random", "index" if options.get("recurrent") else "interleaved")
    return sparse_stack((inputs, 22, 13, 5), neurons, steps, backend, gain=3.0, kinds=kinds, **options)


class Reference:
    """The network as a loop over steps in float64: the definition, with every spike kept."""

    def __init__(self, net: SpikingNetwork) -> None:
        self.net = net
        self.tensors = {
            name: value.detach().double().requires_grad_(value.dtype.is_floating_point)
            for name, value in net.named_parameters()
        }

    def run(self, x: torch.Tensor, dropped: dict[str, torch.Tensor] | None = None, scale: float = 1.0):
        """Spikes [T, B, N] by population, x being [T, B, D]; ``scale``: of what is sent, where neurons are dropped."""
        net, t64 = self.net, self.tensors
        sent = {name: [] for name in net.populations} | {"input": list(x)}
        states, membranes = dict.fromkeys(net.populations), {name: [] for name in net.populations}
        self.arrived = {}
        order = self.order()
        names = [*net.populations, "input"]
        weights = {
            name: (c.mask.unpack(t64[f"{name}.values"]), t64.get(f"{name}.bias"))
            for name, c in net.connections().items()
        }
        own = {name: self.own(name) for name in order}
        nothing = {name: x.new_zeros(x.shape[1], size) for name, size in zip(net.populations, net.sizes, strict=False)}
        silent_ones = dropped or {}

        def send(name: str, current: torch.Tensor, to_membrane: torch.Tensor | None = None):
            spikes, after = neurons_step(current, states[name], own[name], to_membrane)
            return spikes.masked_fill(silent_ones[name], 0) if name in silent_ones else spikes, after

        for t in range(len(x)):
            for name in self.at_once:  # whose spikes come before anything arrives
                sent[name].append(send(name, nothing[name])[0])
            for name in order:
                current, to_membrane = 0, None
                for each in net.projections():
                    if names[each.target] != name:
                        continue
                    source, silent = names[each.source], torch.zeros(x.shape[1], dtype=x.dtype)
                    delays = enumerate(net.delays(each.name).tolist())
                    received = torch.stack([sent[source][t - d][:, j] if t >= d else silent for j, d in delays], 1)
                    if not received.requires_grad:  # nothing has arrived yet, but its gradient says what would
                        received.requires_grad_()
                    self.arrived[each.name, t] = received
                    weight, bias = weights[each.name]
                    added = (received * (scale if source != "input" else 1)) @ weight.T
                    added = added if bias is None else added + bias
                    if each.onto:
                        to_membrane = added if to_membrane is None else to_membrane + added
                    else:
                        current = current + added
                spikes, states[name] = send(name, current + nothing[name], to_membrane)
                membranes[name].append(states[name][-1])
                if name not in self.at_once:
                    sent[name].append(spikes)
        self.membranes = {name: torch.stack(of_steps) for name, of_steps in membranes.items()}
        return {name: torch.stack(sent[name]) for name in net.populations}

    def own(self, name: str) -> Neurons:
        """The neurons of a population, with these parameters."""
        module = self.net.neurons()[name]
        own = {each: self.tensors[f"{name}.{each}"] for each in module.by_name}
        names = MODELS[module.model_name].parameters
        if "gain" in names:
            own["gain"] = exact_gain(own["syn_decay"], own["beta"])
        return module.population._replace(
            parameters=tuple([own.get(each, getattr(module, each).double()) for each in names])
        )

    @property
    def at_once(self) -> list[str]:
        """The populations that are reset in the step of their spike."""
        return [name for name, neurons in self.net.neurons().items() if isinstance(neurons, CubaLIF)]

    def order(self) -> list[str]:
        """The populations so that those with a delay of 0 between them are in order, if they need to be."""
        names, done = [*self.net.populations, "input"], []
        at_once = [(names[each.source], names[each.target]) for each in self.net.projections() if each.least == 0]
        at_once = [each for each in at_once if each[0] not in self.at_once]
        while left := [name for name in self.net.populations if name not in done]:
            done.append(next(name for name in left if not {a for a, b in at_once if b == name} & set(left)))
        return done

    def gradients(
        self, loss: torch.Tensor, spikes: dict[str, torch.Tensor], x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        wanted = {n: v for n, v in self.tensors.items() if not n.endswith("_delay")}
        wanted |= {key: value for key, value in self.arrived.items() if value.requires_grad}
        grads = dict(zip(wanted, torch.autograd.grad(loss, [*wanted.values()], allow_unused=True), strict=True))
        result = {n: torch.zeros_like(wanted[n]) if g is None else g for n, g in grads.items() if isinstance(n, str)}
        names = [*self.net.populations, "input"]
        for each in self.net.projections():
            if f"{each.name}_delay" not in self.tensors:
                continue
            source = spikes[names[each.source]].detach() if each.source >= 0 else x.detach()
            at = lambda t, j: source[t, :, j] if 0 <= t < len(source) else torch.zeros(x.shape[1], dtype=x.dtype)  # noqa: B023, E731
            grad, width = torch.zeros(source.shape[-1], dtype=x.dtype), each.width
            for j, d in enumerate(self.net.delays(each.name).tolist()):
                for t in range(len(source)):
                    g = grads.get((each.name, t))
                    for k in range(1, width + 1) if g is not None else ():
                        grad[j] -= (g[:, j] * (at(t - d + k, j) - at(t - d - k, j))).sum()
            result[f"{each.name}_delay"] = grad / (width * (width + 1))
        return result
