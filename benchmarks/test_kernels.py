"""Our kernels on fixed random inputs, to compare a change with an earlier commit.

    pytest -n 0 benchmarks --benchmark-autosave      # before
    pytest -n 0 benchmarks --benchmark-compare       # after

Outside the normal test run. Every kernel's results are compared with plain PyTorch in float64 before it is timed.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from g2g_kernels import BlockMask, GroupLayout, available_backends, g2g_linear, lif
from g2gnet import DSTScheduler, G2GNet
from g2gnet.data import as_samples, load_dataset

from .machine import synchronize

BATCH, STEPS, HIDDEN = 64, 20, 1024
UNITS = (64, 16, 1)
#: optimizer steps before a network is timed
TRAINED = 30


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" else "cpu")


def mask_of(block_size: int) -> BlockMask:
    layout = GroupLayout(HIDDEN)
    return BlockMask.sample(layout, layout, block_size=block_size, generator=generator())


def timed(benchmark: Any, backend: str, work: Callable[[], object]) -> None:
    """Times ``work``, including the device."""

    def turn() -> None:
        work()
        synchronize(device_of(backend))

    benchmark.pedantic(turn, rounds=10, warmup_rounds=2)


def differentiate(function: Callable, tensors: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    """The result of ``function`` and the gradients of its tensors."""
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result, tensors, gradient)]


def compared(
    benchmark: Any, backend: str, function: Callable, tensors: list[torch.Tensor], gradient: torch.Tensor
) -> None:
    """Checks ``function(backend, …)``, forward and backward, against plain PyTorch in float64, and times it."""
    leaves = [tensor.to(device_of(backend)).requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    gradient_there = gradient.to(device_of(backend))

    def work() -> list[torch.Tensor]:
        return differentiate(lambda *given: function(backend, *given), leaves, gradient_there)

    expected = differentiate(lambda *given: function("torch", *given), exact, gradient.double())
    for actual, right in zip(work(), expected, strict=True):
        difference = (actual.cpu() - right).abs().sum() / right.abs().sum()
        assert difference < 1e-5, f"off by {difference:.1e}"
    timed(benchmark, backend, work)


@pytest.mark.parametrize("rate", [0.05, None], ids=["spikes", "dense"])
@pytest.mark.parametrize("block_size", UNITS)
@pytest.mark.parametrize("backend", available_backends())
def test_g2g_linear(benchmark, backend, block_size, rate):
    draw = generator()
    mask = mask_of(block_size)
    x = torch.randn(STEPS * BATCH, HIDDEN, generator=draw)
    x = x if rate is None else (x > torch.quantile(x[0], 1 - rate)).float()
    values = torch.randn(mask.num_units, *mask.unit_shape, generator=draw)
    gradient = torch.randn(len(x), HIDDEN, generator=draw)
    mask = mask.to(device_of(backend))
    compared(
        benchmark,
        backend,
        lambda name, *given: g2g_linear(given[0], given[1], mask, backend=name),
        [x, values],
        gradient,
    )


@pytest.mark.parametrize("backend", available_backends())
def test_lif(benchmark, backend):
    draw = generator()
    # far enough from the threshold on average that float32 and float64 spike alike
    current = torch.randint(-8, 9, (STEPS, BATCH, HIDDEN), generator=draw) / 8 + 0.03
    gradient = torch.randn(current.shape, generator=draw)
    parameters = [torch.tensor(0.875), torch.tensor(1.0)]
    compared(
        benchmark,
        backend,
        lambda name, x, beta, threshold: lif(x, beta, threshold, backend=name),
        [current, *parameters],
        gradient,
    )


@functools.cache
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Real images and their classes."""
    data = load_dataset("fashionmnist-mini")
    return as_samples(data.train_images[:BATCH]), data.train_labels[:BATCH]


@functools.cache
def trained(block_size: int) -> dict[str, torch.Tensor]:
    """The state of a network after some steps: what it costs depends on how often its neurons fire."""
    net = untrained(None, block_size)
    optimizer = torch.optim.Adam(net.parameters())
    images, labels = batch()
    for _ in range(TRAINED):
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.state_dict()


def untrained(backend: str | None, block_size: int) -> G2GNet:
    return G2GNet(784, HIDDEN, 10, "index", T=STEPS, block_size=block_size, backend=backend, generator=generator())


def network(backend: str, block_size: int) -> G2GNet:
    net = untrained(backend, block_size)
    net.load_state_dict(trained(block_size))
    return net


@pytest.mark.parametrize("block_size", UNITS)
@pytest.mark.parametrize("backend", available_backends())
def test_training_step(benchmark, backend, block_size):
    images, labels = batch()[0], batch()[1].to(device_of(backend))
    net = network(backend, block_size).to(device_of(backend))
    exact = network("torch", block_size).double()(images.double())
    assert exact.sum() > BATCH, "the output neurons hardly fire"
    images = images.to(device_of(backend))
    difference = (net(images).cpu() - exact).abs().sum() / exact.abs().sum()
    assert difference < 1e-3, f"counts are off by {difference:.1e}"  # a spike or two may flip
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, fused=True)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    timed(benchmark, backend, work)


@pytest.mark.parametrize("block_size", UNITS)
@pytest.mark.parametrize("backend", available_backends())
def test_dst_update(benchmark, backend, block_size):
    images = batch()[0].to(device_of(backend))
    net = network(backend, block_size).to(device_of(backend))
    optimizer = torch.optim.Adam(net.parameters())
    connections = [connection for connection, _ in net.layers()]
    scheduler = DSTScheduler(connections, optimizer, interval=1)
    activity = net.simulate(images)
    units = [connection.mask.num_units for connection in connections]
    timed(benchmark, backend, lambda: scheduler.step(images, activity))
    assert scheduler.pruned == scheduler.grown == scheduler.steps * sum(int(0.1 * count) for count in units)
