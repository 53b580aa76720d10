"""Populations and projections with delays, against a float64 loop over steps that keeps every spike."""

import pytest
import torch
from helpers import rms, seeded

from g2g_kernels import BlockMask, GroupLayout, available_backends
from g2g_kernels.ops.neurons.step import neurons_step
from g2gnet import LIF, AdLIF, G2GLinear, Projection, SpikingNetwork, Synaptic

T, B, D = 11, 3, 10
SIZES = {"input": D, "a": 9, "b": 13, "c": 6, "out": 5}
BACKENDS = [name for name in ("torch", "cpu") if name in available_backends()]


def joined(source: str, target: str, draw: torch.Generator, unit: int = 1, bias: bool = True) -> G2GLinear:
    out, into = (GroupLayout(SIZES[name], 3, "random", draw) for name in (target, source))
    connection = G2GLinear(BlockMask.sample(out, into, 1, 0.6, unit, draw), bias=bias, generator=draw)
    connection.values.data *= 2.5
    return connection


#: by name: (source, target, delay) of each projection; (low, high): drawn for each neuron; "learned": a parameter
GRAPHS = {
    "chain": [("input", "a", 0), ("a", "b", 0), ("b", "out", 0)],
    "chain with delays": [("input", "a", 2), ("a", "b", (0, 4)), ("b", "out", 3)],
    "skips": [("input", "a", 0), ("a", "b", 0), ("a", "out", 1), ("input", "b", (0, 3)), ("b", "out", 0)],
    "self-loops": [("input", "a", 0), ("a", "a", 1), ("a", "a", 3), ("a", "b", 0), ("b", "b", (2, 5)), ("b", "out", 0)],
    "feedback": [("input", "a", 0), ("a", "b", 1), ("b", "a", 2), ("b", "out", 0)],
    "fast feedback": [("input", "a", 0), ("a", "b", 0), ("b", "a", 1), ("b", "out", 0)],
    "ring": [("input", "a", 0), ("a", "b", 1), ("b", "c", 2), ("c", "a", 1), ("c", "out", 0)],
    "from the output": [("input", "a", 0), ("a", "out", 0), ("out", "a", 2)],
    "twice the same": [("input", "a", 0), ("a", "out", 0), ("a", "out", 2)],
    "learned": [("input", "a", "learned"), ("a", "b", "learned"), ("b", "out", 0)],
    "learned on a cycle": [("input", "a", 0), ("a", "b", "learned"), ("b", "a", "learned"), ("b", "out", 1)],
}


def network(name: str, backend: str | None = None, unit: int = 1, seed: int = 0, **options) -> SpikingNetwork:
    draw, projections = seeded(seed), []
    for source, target, delay in GRAPHS[name]:
        learned = {}
        if isinstance(delay, tuple):
            delay = torch.randint(delay[0], delay[1] + 1, (SIZES[source],), generator=draw)
        elif delay == "learned":
            delay = torch.rand(SIZES[source], generator=draw) * 7 - 1
            delay, learned = delay.clamp(0, 5), {"learn_delay": True, "max_delay": 5}
        connection = joined(source, target, draw, unit, bias=source != target)
        connection.backend = backend
        projections.append(Projection(source, target, connection, delay, **learned))
    kinds = {"a": LIF(SIZES["a"], threshold=0.4), "b": AdLIF(threshold=0.5), "c": Synaptic(), "out": LIF(threshold=0.6)}
    populations = {each: kinds[each] for each in kinds if any(p.target == each for p in projections)}
    return SpikingNetwork(populations, projections, "out", T, backend=backend, **options)


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
        states = dict.fromkeys(net.populations)
        self.arrived = {}
        order = [each for part in self.parts() for each in part]
        names = [*net.populations, "input"]
        weights = {
            name: (c.mask.unpack(t64[f"{name}.values"]), t64.get(f"{name}.bias"))
            for name, c in net.connections().items()
        }
        for t in range(len(x)):
            for name in order:
                current = 0
                for route in net.routes():
                    if names[route.target] != name:
                        continue
                    source, delays = names[route.source], net.delays(route.name)
                    rows = []
                    for j, d in enumerate(delays.tolist()):
                        rows.append(sent[source][t - d][:, j] if t >= d else torch.zeros(x.shape[1], dtype=x.dtype))
                    received = torch.stack(rows, 1)
                    if received.requires_grad:
                        received.retain_grad()
                    self.arrived[route.name, t] = received
                    weight, bias = weights[route.name]
                    current = current + (received * (scale if source != "input" else 1)) @ weight.T
                    current = current if bias is None else current + bias
                module = net.neurons()[name]
                population = module.population._replace(
                    parameters=tuple(t64[f"{name}.{each}"] for each in type(module).model.parameters)
                )
                spikes, states[name] = neurons_step(current, states[name], population)
                if dropped and name in dropped:
                    spikes = spikes.masked_fill(dropped[name], 0)
                sent[name].append(spikes)
        return {name: torch.stack(sent[name]) for name in net.populations}

    def parts(self):
        """The populations so that those with a delay of 0 between them are in order."""
        left, done = list(self.net.populations), []
        names = [*self.net.populations, "input"]
        while left:
            for name in left:
                instant = {names[r.source] for r in self.net.routes() if names[r.target] == name and r.least == 0}
                if not instant & set(left) - {name} and name not in instant:
                    left.remove(name)
                    done.append(name)
                    break
            else:
                raise AssertionError("a cycle without delay")
        return [done]

    def gradients(
        self, loss: torch.Tensor, spikes: dict[str, torch.Tensor], x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        named = {n: v for n, v in self.tensors.items() if not n.endswith("_delay")}
        arrived = {key: value for key, value in self.arrived.items() if value.requires_grad}
        grads = torch.autograd.grad(loss, [*named.values(), *arrived.values()], allow_unused=True)
        result = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(named.items(), grads, strict=False)}
        of_arrived = dict(zip(arrived, grads[len(named) :], strict=True))
        names = [*self.net.populations, "input"]
        for route in self.net.routes():
            if f"{route.name}_delay" not in self.tensors:
                continue
            source = spikes[names[route.source]].detach() if route.source >= 0 else x.detach()
            at = lambda t, j: source[t, :, j] if 0 <= t < len(source) else torch.zeros(B, dtype=x.dtype)  # noqa: B023, E731
            grad = torch.zeros(source.shape[-1], dtype=x.dtype)
            for j, d in enumerate(self.net.delays(route.name).tolist()):
                for t in range(len(source)):
                    g = of_arrived.get((route.name, t))
                    if g is not None:
                        grad[j] -= 0.5 * (g[:, j] * (at(t - d + 1, j) - at(t - d - 1, j))).sum()
            result[f"{route.name}_delay"] = grad
        return result


def loss_of(spikes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of when each neuron fires."""
    draw = seeded(9)
    return sum(
        (each * torch.randn(each.shape, generator=draw, dtype=torch.float64).to(each)).sum() for each in spikes.values()
    )


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_spikes_and_gradients_are_those_of_the_definition(backend, name, held):
    net = network(name, backend, unit={"skips": 4, "feedback": 16}.get(name, 1))
    x = torch.rand((B, D) if held else (T, B, D), generator=seeded(4)) * 2
    x64 = (x.expand(T, B, D) if held else x).double().requires_grad_()
    reference = Reference(net)
    expected = reference.run(x64)
    activity = net.simulate(x.requires_grad_(), spikes=True)
    ours = {each: train.dense() for each, train in activity.spikes.items()}
    assert sum(each.sum() for each in ours.values()) > 50
    for each in net.populations:
        assert torch.equal(ours[each].double(), expected[each]), each
    assert torch.equal(activity.counts.double(), expected["out"].sum(0))
    loss_of(ours).backward()
    gradients = reference.gradients(loss_of(expected), expected, x64)
    assert set(gradients) == {each for each, _ in net.named_parameters()}
    for each, parameter in net.named_parameters():
        error = rms(parameter.grad.double() - gradients[each])
        # one number for all neurons is a sum of a thousand terms of both signs
        assert error <= (2e-4 if parameter.numel() == 1 else 2e-5) * rms(gradients[each]) + 1e-7, each
