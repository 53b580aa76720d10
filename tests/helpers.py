"""Slow, independent descriptions of what the kernels compute, and the rule by which a backend is judged."""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from g2g_kernels import (
    BackendError,
    BlockMask,
    Connection,
    GroupLayout,
    Neurons,
    Population,
    available_backends,
    dispatch,
)
from g2g_kernels.dispatch import Operator
from g2g_kernels.mask.wiring import with_checksums
from g2g_kernels.ops.g2g_stack.population import ONE_STEP
from g2g_kernels.ops.neurons import MODELS
from g2g_kernels.triton.runtime import interpreted

#: the repository
ROOT = Path(__file__).parents[1]

#: marks a test that compiles a whole network or layer
compiles_whole = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="PyTorch 2.4 and 2.5 do not compile it whole"
)


def backends_of(operator: Operator) -> list[str]:
    """Every backend of an operator that can be used on this machine; the parity tests run on each. Triton's interpreter
    is too slow for them: it has tests of its own, ``test_triton_*.py``."""
    names = [name for name in available_backends() if name in operator.ways]
    return [name for name in names if name != "triton" or not interpreted()]


def device_of(backend: str | None) -> str:
    """Where the tests of ``backend`` keep their tensors (None, the library's own choice, is tested on the CPU)."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def unavailable(monkeypatch: pytest.MonkeyPatch, **reasons: str | None) -> None:
    """Makes backends unavailable for a reason, or (None) available, whatever this machine has."""
    for name, reason in reasons.items():
        backend = dispatch.BACKENDS[name]._replace(unavailable=lambda reason=reason: reason)
        monkeypatch.setitem(dispatch.BACKENDS, name, backend)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved_and_read(content: Any, weights_only: bool = True) -> Any:
    """``content`` as it comes back from a file."""
    file = io.BytesIO()
    torch.save(content, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=weights_only)


class Largest(TorchDispatchMode):
    """``with Largest() as largest``: ``largest.numel`` elements has the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):  # an expanded one has few elements in memory
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, min(tensor.numel(), stored))
        return made


class MaskCase(NamedTuple):
    """A layer's sizes, groups and unit size; the sizes are odd where they can be."""

    out_size: int
    in_size: int
    groups: int
    out_kind: str
    in_kind: str
    block_size: int

    def mask(self, p_inter: float = 0.4, p_intra: float = 1.0, seed: int = 0) -> BlockMask:
        draw = seeded(seed)
        out_layout = GroupLayout(self.out_size, self.groups, self.out_kind, draw)
        in_layout = GroupLayout(self.in_size, self.groups, self.in_kind, draw)
        return BlockMask.sample(out_layout, in_layout, p_intra, p_inter, self.block_size, draw)


MASK_CASES = {
    "whole units": MaskCase(16, 24, 4, "index", "index", 4),
    "whole units, interleaved": MaskCase(16, 24, 4, "interleaved", "interleaved", 2),
    "784 to 2048, an eighth": MaskCase(256, 98, 8, "index", "index", 16),
    "ten outputs": MaskCase(10, 43, 8, "index", "index", 3),
    "single weights": MaskCase(13, 11, 3, "random", "random", 1),
    "ragged groups of 64": MaskCase(264, 300, 4, "random", "interleaved", 64),
    "groups smaller than a unit": MaskCase(29, 50, 8, "interleaved", "random", 64),
    "one group": MaskCase(7, 5, 1, "index", "index", 3),
}


def neurons_of_units(layout: GroupLayout, block_size: int) -> list[list[int]]:
    """The neurons in each range of units: group by group, in as few and as equal parts as can be, longer ones first."""
    ranges = []
    for group in range(layout.num_groups):
        neurons = [i for i, g in enumerate(layout.group_of.tolist()) if g == group]
        parts = math.ceil(len(neurons) / block_size)
        while parts:
            length = math.ceil(len(neurons) / parts)
            ranges.append(neurons[:length])
            neurons, parts = neurons[length:], parts - 1
    return ranges


def dense_by_loop(mask: BlockMask, values: torch.Tensor) -> torch.Tensor:
    """The dense weight of packed values, unit by unit."""
    rows = neurons_of_units(mask.rows.layout, mask.block_size)
    cols = neurons_of_units(mask.cols.layout, mask.block_size)
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    for slot, (row, col) in enumerate(zip(mask.unit_row.tolist(), mask.unit_col.tolist(), strict=True)):
        r, c = torch.tensor(rows[row]), torch.tensor(cols[col])
        dense[r[:, None], c[None, :]] = values[slot, : len(r), : len(c)]
    return dense


def packed_randn(mask: BlockMask, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random packed values, zero in the padding, scaled to the fan-in."""
    values = torch.randn(mask.num_units, *mask.unit_shape, generator=seeded(seed)) * mask.valid()
    return (values / max(1.0, mask.density * mask.shape[1]) ** 0.5).to(dtype)


def unread_padding(mask: BlockMask, values: torch.Tensor) -> torch.Tensor:
    """The values with NaN in the padding, which nothing may read."""
    return values.masked_fill(~mask.valid(), torch.nan)


def row_with(mask: BlockMask, **changes: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The row that describes a mask, with some parts changed by functions and with the right checksums."""
    parts = {"block_size": mask.block_size, "out_group_of": mask.rows.layout.group_of.clone()}
    parts |= {"in_group_of": mask.cols.layout.group_of.clone()}
    parts |= {"unit_row": mask.unit_row.clone(), "unit_col": mask.unit_col.clone()}
    parts |= {name: change(parts[name]) for name, change in changes.items()}
    sizes = torch.tensor([len(parts["out_group_of"]), len(parts["in_group_of"]), parts.pop("block_size")])
    return with_checksums(torch.cat([sizes, *(part.long() for part in parts.values())]))


def with_one(index: int | tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What replaces one number of a tensor, as a change for :func:`row_with`."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def units_of(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``unit_row`` and ``unit_col`` in a row that describes a mask, int64."""
    out_size, in_size = row[:2].int().tolist()
    unit_row, unit_col = row[3 + out_size + in_size : -2].long().view(2, -1)
    return unit_row, unit_col


def lif_by_autograd(
    current: torch.Tensor, beta: torch.Tensor, threshold: torch.Tensor, reset: str, primitive: Callable, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and membranes of the formula, differentiated by autograd through the surrogate's primitive."""
    membrane = torch.zeros_like(current[0])
    spikes, membranes = [], []
    for current_t in current:
        fired = (membrane > threshold).to(current.dtype)
        if reset == "zero":
            membrane = (1 - fired) * membrane
        membrane = beta.clamp(0, 1) * membrane + current_t
        if reset == "subtract":
            membrane = membrane - threshold * fired
        smooth = primitive(membrane - threshold, alpha)
        spikes.append((membrane > threshold).to(current.dtype) + (smooth - smooth.detach()))
        membranes.append(membrane)
    return torch.stack(spikes), torch.stack(membranes)


def clamps_alike(beta: torch.Tensor) -> torch.Tensor:
    """Where torch.clamp(β, 0, 1) has the slope that our neurons give it (before PyTorch 2.15 it has one at 0 and 1)."""
    leaf = beta.detach().clone().requires_grad_()
    leaf.clamp(0, 1).sum().backward()
    return (leaf.grad == 1) == ((beta > 0) & (beta < 1))


def chained(number: int, values, mask: BlockMask, bias, neurons: Neurons, recurrent=None, **fields) -> Population:
    """Population ``number`` of a chain; ``recurrent``: values and mask of that connection, or None."""
    connections = [Connection("linear", values, mask, number - 1, fields.pop("delay", None), bias)]
    if recurrent is not None:
        connections.append(Connection("linear", *recurrent, number, ONE_STEP))
    return Population(neurons, tuple(connections), **fields)


def lif_layer(values, mask: BlockMask, bias, beta, threshold, dropped=None, number: int = 0, **options) -> Population:
    """Population ``number`` of a chain, of LIF neurons."""
    return chained(number, values, mask, bias, Neurons("lif", (beta, threshold), **options), dropped=dropped)


def changed(population: Population, **fields: object) -> Population:
    """A population with other fields: its own, those of its first connection, or of its neurons (or a parameter)."""
    first, *rest = population.connections
    neurons = population.neurons
    for name, value in fields.items():
        if name in population._fields:
            population = population._replace(**{name: value})
        elif name in first._fields:
            first = first._replace(**{name: value})
        elif name in neurons._fields:
            neurons = neurons._replace(**{name: value})
        else:
            pairs = zip(MODELS[neurons.model].parameters, neurons.parameters, strict=True)
            neurons = neurons._replace(parameters=tuple(value if each == name else own for each, own in pairs))
    if "neurons" not in fields:
        population = population._replace(neurons=neurons)
    return population if "connections" in fields else population._replace(connections=(first, *rest))


# --- the rule -----------------------------------------------------------------------------------------------------


def rms(tensor: torch.Tensor) -> float:
    """The root mean square of all elements."""
    return tensor.double().square().mean().sqrt().item()


def as_near(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, bound: float) -> bool:
    """Whether an error is at most ``bound`` of the exact result, or three times plain PyTorch's in the same dtype."""
    error, plain_error = (rms(tensor.double() - exact.double()) for tensor in (actual, plain))
    return error <= max(bound * rms(exact), 3 * plain_error)


class ErrorRatios:
    """The rule for kernels: an error against float64 of at most 1.5 times that of plain PyTorch in the same dtype. A
    tensor of a few elements is nearer to or farther from the exact result by luck (single ratios run from 0.2 to 5), so
    the rule is applied to the geometric mean over many cases, tensor by tensor. An error below half a unit in the last
    place counts as that: no result can be expected to be nearer, while plain PyTorch may happen upon exact values."""

    def __init__(self) -> None:
        self._logarithms: dict[str, list[float]] = {}

    def add(self, name: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        """One case: a backend's result, the ``torch`` backend's in the same dtype, and that in float64."""
        assert actual.dtype == plain.dtype, f"{name} has dtype {actual.dtype}, the torch backend gives {plain.dtype}"
        assert actual.shape == plain.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}"
        assert torch.isfinite(actual).all(), f"{name} is not finite everywhere"
        least = torch.finfo(actual.dtype).eps / 2 * rms(exact)
        error, plain_error = (max(rms(tensor.double() - exact.double()), least) for tensor in (actual, plain))
        self._logarithms.setdefault(name, []).append(math.log(error / plain_error))

    def means(self) -> dict[str, tuple[float, int]]:
        """The geometric mean of each tensor, and over how many cases."""
        return {name: (math.exp(sum(logs) / len(logs)), len(logs)) for name, logs in self._logarithms.items()}

    def check(self, cases: int, at_most: float = 1.5) -> None:
        means = self.means()
        assert means, "no case was compared"
        assert {number for _, number in means.values()} == {cases}
        too_large = {name: f"{ratio:.2f}" for name, (ratio, _) in means.items() if ratio > at_most}
        assert not too_large, f"errors are above {at_most} times those of plain PyTorch: {too_large}"


@contextmanager
def skip_where_refused() -> Iterator[None]:
    """For calls that a backend may decline, with a reason: the test is skipped, and says why."""
    try:
        yield
    except BackendError as refusal:
        pytest.skip(str(refusal))
