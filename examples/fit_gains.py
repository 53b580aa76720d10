"""Fits 100 gains, one for each pair of cell types, to the firing rates of a network whose gains are known.

    python examples/fit_gains.py [SEED ...]

Ten types of 500 CubaLIF neurons, three of them inhibitory, have 200,000 connections. A weight is a known count of
synapses times the gain of its pair of types. The fit sees the types' rates under 96 stimuli, and is judged by others.
"""

import sys
import time

import torch
from torch.nn.utils import parametrize

from g2gnet import CubaLIF, Projection, SpikingNetwork

TYPES, SIZE, NEURONS, FAN_OUT, CHANNELS, STEPS = 10, 500, 5000, 40, 40, 100
WINDOWS = 5, 10, 20, 40  # steps, at whose end gradients end, in each quarter of the fit: those of the whole run explode
LONGEST = 0.03  # gradient


class GainOfPair(torch.nn.Module):
    """w = exp(gain of the pair of types) · signed count; int64 [edges], float [edges]."""

    def __init__(self, pair: torch.Tensor, count: torch.Tensor) -> None:
        super().__init__()
        self.pair, self.count = pair, count

    def forward(self, gain: torch.Tensor) -> torch.Tensor:
        return (gain.exp()[self.pair] * self.count).view(-1, 1, 1)

    def right_inverse(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(TYPES**2)


def brain(draw: torch.Generator) -> tuple[SpikingNetwork, torch.Tensor]:
    """The network and its gains [100], which are 0."""
    pre = torch.arange(NEURONS).repeat_interleave(FAN_OUT)
    post = torch.randint(NEURONS, pre.shape, generator=draw)
    count = torch.empty(pre.shape).geometric_(0.3, generator=draw) * torch.where(pre < 3 * SIZE, -1.5, 1.0)
    wiring = Projection.from_edges("brain", "brain", pre, post, 0.1 * count, 1, (NEURONS, NEURONS))
    channel = torch.arange(CHANNELS).repeat_interleave(NEURONS // 4)  # each excites one type more than others
    reached = torch.randint(NEURONS, channel.shape, generator=draw)
    strength = torch.where(reached // SIZE == channel % TYPES, 1.0, 0.15)
    inputs = Projection.from_edges("input", "brain", channel, reached, strength, 0, (CHANNELS, NEURONS))
    cells = CubaLIF(NEURONS, tau=20.0, tau_syn=5.0, dt=1.0, surrogate="triangle", alpha=1.0)
    net = SpikingNetwork({"brain": cells}, [*inputs, *wiring], output="brain", T=STEPS).requires_grad_(False)
    layer, edges = net.brain_to_brain, net.brain_to_brain.mask.edges()
    pair = torch.from_numpy(edges.source // SIZE * TYPES + edges.target // SIZE)
    parametrize.register_parametrization(layer, "values", GainOfPair(pair, layer.values.flatten().clone()))
    return net, layer.parametrizations["values"].original


def rates_of(net: SpikingNetwork, x: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The mean rates [B, types] in spikes a step."""
    counts = net.simulate(x, truncate=window).output
    return counts.unflatten(1, (TYPES, SIZE)).mean(2) / len(x)


def fit(seed: int, iterations: int = 400) -> tuple[float, float]:
    """The mean difference of held-out rates from the known ones, relative to their mean: before and after."""
    draw = torch.Generator().manual_seed(seed)
    net, gains = brain(draw)
    known, begin = (0.6 * torch.randn(TYPES**2, generator=draw) for _ in range(2))
    of_channels = 0.3 * torch.rand(128, CHANNELS, generator=draw) ** 2
    train, unseen = (torch.rand(STEPS, 128, CHANNELS, generator=draw) < of_channels).float().split([96, 32], 1)

    @torch.no_grad()
    def compared(own: torch.Tensor) -> float:
        gains.copy_(own)
        return ((rates_of(net, unseen) - of_unseen).abs().mean() / of_unseen.mean()).item()

    gains.requires_grad_(False).copy_(known)
    wanted, of_unseen = rates_of(net, train), rates_of(net, unseen)
    before = compared(begin)
    optimizer = torch.optim.Adam([gains.requires_grad_()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, iterations)
    for step, batch in enumerate(torch.rand(iterations, 96, generator=draw).argsort(1)[:, :8]):
        optimizer.zero_grad()
        rates = rates_of(net, train[:, batch], WINDOWS[step * len(WINDOWS) // iterations])
        ((rates - wanted[batch]).abs().mean() / wanted.mean()).backward()
        torch.nn.utils.clip_grad_norm_([gains], LONGEST)
        optimizer.step()
        schedule.step()
    return before, compared(gains.detach().clone())


if __name__ == "__main__":
    for seed in [int(each) for each in sys.argv[1:]] or [0, 1, 2]:
        began = time.process_time()
        before, after = fit(seed)
        print(f"seed {seed}: {before:.1%}, then {after:.1%}, {time.process_time() - began:.0f} s of a core", flush=True)
