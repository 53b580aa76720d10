"""Every operator on every backend at small sizes: ``pip install -e ".[bench]" && pytest benchmarks``.

pytest-benchmark prints a table for each operator and direction, with a row for each backend. Before anything is timed,
results and gradients are compared with those of backend ``torch`` in float64; currents are multiples of powers of two,
so that spikes are equal. ``--benchmark-autosave`` before a change and ``--benchmark-compare`` after it show its effect.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from g2g_kernels import BackendError, BlockMask, GroupLayout, adlif, available_backends, g2g_linear, lif, synaptic
from g2gnet import G2GNet

SIZE, BATCH, STEPS = 256, 32, 10
ALLOWED = 1e-5  # error of a result or gradient, relative to its norm


#: an operator with its inputs on one backend, and the inputs whose gradients are wanted
Case = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]


def multiples(of: float, least: int, most: int, *shape: int) -> torch.Tensor:
    """Random multiples of a number, from ``least`` to ``most`` times it."""
    return of * torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(0)).double()


def product(block_size: int, backend: str, device: str, dtype: torch.dtype) -> Case:
    """The product of a sparse layer with spikes at a rate of 25 %."""
    layout = GroupLayout(SIZE)
    mask = BlockMask.sample(layout, layout, block_size=block_size, generator=torch.Generator().manual_seed(0))
    x = multiples(1.0, 0, 3, STEPS * BATCH, SIZE) == 0
    given = x, multiples(0.25, -4, 4, mask.num_units, *mask.unit_shape), multiples(0.25, -4, 4, SIZE)
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in given]
    mask = mask.to(device)
    return (lambda: g2g_linear(leaves[0], leaves[1], mask, leaves[2], backend=backend), leaves)


def neurons(operator: Callable, count: int, backend: str, device: str, dtype: torch.dtype) -> Case:
    """Neurons alone with ``count`` parameters of 1/2 and a threshold of 1."""
    given = multiples(0.125, -8, 12, STEPS, BATCH, SIZE), *[torch.tensor(0.5)] * count, torch.tensor(1.0)
    leaves = [tensor.to(device, dtype).clone().requires_grad_() for tensor in given]
    return (lambda: operator(*leaves, backend=backend), leaves)


def network(recurrent: bool, backend: str, device: str, dtype: torch.dtype) -> Case:
    """A network in one call, to the spike counts of its last layer."""
    options: dict[str, Any] = {"block_size": 16, "T": STEPS, "beta": 0.5, "recurrent": recurrent, "backend": backend}
    net = G2GNet(SIZE, SIZE, 10, **options, generator=torch.Generator().manual_seed(0))
    for parameter in [each for connection in net.connections().values() for each in connection.parameters()]:
        parameter.data = (parameter.data * 32).round() / 8
    net.to(device, dtype)
    x = multiples(0.5, 0, 4, BATCH, SIZE).to(device, dtype).requires_grad_()
    return (lambda: net(x), [x, *net.parameters()])


OPERATORS = {
    **{f"g2g_linear, blocks of {side}": functools.partial(product, side) for side in (64, 16, 1)},
    "lif": functools.partial(neurons, lif, 1),
    "synaptic": functools.partial(neurons, synaptic, 2),
    "adlif": functools.partial(neurons, adlif, 4),
    "g2g_stack": functools.partial(network, False),
    "g2g_stack, recurrent": functools.partial(network, True),
}


def results(run: Callable, leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], object]]:
    """What an operator returns and its gradients, and a function that computes these again."""
    y = run()
    gradient = multiples(0.125, 1, 8, *y.shape).to(y)  # of one sign, so that no sum cancels
    again = functools.partial(torch.autograd.grad, y, leaves, gradient, retain_graph=True)
    return [y.detach(), *again()], again


@functools.cache
def expected(name: str) -> list[torch.Tensor]:
    """Result and gradients in float64."""
    return results(*OPERATORS[name]("torch", "cpu", torch.float64))[0]


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(benchmark, name, direction, backend):
    torch.set_num_threads(1)  # more take longer at these sizes
    on_gpu = torch.cuda.is_available() and backend != "cpu"
    run, leaves = OPERATORS[name](backend, "cuda" if on_gpu else "cpu", torch.float32)
    try:
        found, backward = results(run, leaves)
    except BackendError as refusal:
        pytest.skip(str(refusal))
    for actual, right in zip(found, expected(name), strict=True):
        error = (actual.cpu().double() - right).norm() / right.norm()
        assert error < ALLOWED, f"off by {error:.1e}"
    turn = backward if direction == "backward" else torch.no_grad()(run)
    benchmark.group, benchmark.name = f"{name}, {direction}", backend
    benchmark(lambda: [turn(), torch.cuda.current_stream().synchronize()] if on_gpu else turn())  # type: ignore
