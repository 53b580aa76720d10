"""A :class:`BlockMask` in other forms: lists of edges, matrices of SciPy and PyTorch, networkx, pictures.

Rows are output neurons (targets), columns input neurons (sources), both in neuron order, as in ``mask.to_dense()``.
"""

import html
import importlib
import re
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels.mask.unit_grid import UnitGrid


class Edges(NamedTuple):
    """The weights that exist, sorted by target, then by source: input and output neuron and their groups, int64 [E];
    their weights, floating point [E], or None if only a mask was given."""

    source: np.ndarray
    target: np.ndarray
    source_group: np.ndarray
    target_group: np.ndarray
    weight: np.ndarray | None

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with one row per edge."""
        columns = {name: column for name, column in self._asdict().items() if column is not None}
        return _optional("pandas").DataFrame(columns)


def edges(mask: UnitGrid, values: torch.Tensor | None = None) -> Edges:
    """The list of edges, on the CPU; with the packed ``values`` also their weights, in float32 or float64.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.full(GroupLayout(2, 1), GroupLayout(3, 1), block_size=1)
        >>> edges(mask).source, edges(mask).target
        (array([0, 1, 2, 0, 1, 2]), array([0, 0, 0, 1, 1, 1]))
    """
    row, col, place = _entries(mask)
    source, target = col.cpu(), row.cpu()
    source_group, target_group = mask.cols.layout.group_of[source], mask.rows.layout.group_of[target]
    weight = None if values is None else _weights(mask, values, place).numpy()
    return Edges(source.numpy(), target.numpy(), source_group.numpy(), target_group.numpy(), weight)


def to_scipy(mask: UnitGrid, values: torch.Tensor | None = None) -> Any:
    """A ``scipy.sparse.csr_array`` [out, in]: of bool, or of the packed ``values``, also where these are zero.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.full(GroupLayout(2, 1), GroupLayout(3, 1), block_size=1)
        >>> to_scipy(mask).toarray()
        array([[ True,  True,  True],
               [ True,  True,  True]])
    """
    from scipy.sparse import csr_array

    row, col, place = _entries(mask)
    data = np.ones(len(row), bool) if values is None else _weights(mask, values, place).numpy()
    return csr_array((data, col.cpu().numpy(), _pointer(mask, row).cpu().numpy()), shape=mask.shape)


def to_csr(mask: UnitGrid, values: torch.Tensor) -> torch.Tensor:
    """The weight as a CSR tensor [out, in] on the device of ``values``, whose dtype it has; differentiable.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.sample(GroupLayout(16), GroupLayout(16), block_size=2)
        >>> to_csr(mask, mask.pack(torch.ones(16, 16))).shape
        torch.Size([16, 16])
    """
    mask.check_values(values)
    row, col, place = _entries(mask)
    data = values.reshape(-1)[place]
    return torch.sparse_csr_tensor(_pointer(mask, row), col, data, mask.shape, check_invariants=False)


def to_bsr(mask: UnitGrid, values: torch.Tensor, order: str = "neuron") -> torch.Tensor:
    """The weight as a BSR tensor [out, in] whose blocks are the units; differentiable.

    The ``order`` is ``"neuron"``, for contiguous groups; or ``"group"``, for any: rows are then the neurons
    ``mask.rows.order``, columns ``mask.cols.order``. Raises ValueError if units differ in size, or groups are not
    contiguous and ``order`` is ``"neuron"``.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.sample(GroupLayout(16), GroupLayout(16), block_size=2)
        >>> to_bsr(mask, mask.pack(torch.ones(16, 16))).layout
        torch.sparse_bsr
    """
    mask.check_values(values)
    if order not in ("neuron", "group"):
        raise ValueError(f"order={order!r} is unknown; choose neuron or group")
    if mask.has_padding:
        raise ValueError(
            f"units of {mask.unit_shape[0]} × {mask.unit_shape[1]} do not fill every group: some are smaller, but BSR "
            "has blocks of one size; use to_csr(values), or a block_size that divides the sizes of all groups"
        )
    kinds = {axis.layout.kind for axis in (mask.rows, mask.cols)}
    if order == "neuron" and kinds != {"index"}:
        raise ValueError(
            f"{' and '.join(sorted(kinds - {'index'}))} groups are not blocks of the matrix in neuron order; give "
            "order='group' for the matrix of the neurons mask.rows.order and mask.cols.order, or use to_csr(values)"
        )
    slot = mask.row_slot.long()
    index = mask.row_ptr.long(), mask.unit_col.long()[slot]
    return torch.sparse_bsr_tensor(*index, values[slot], mask.shape, check_invariants=False)


def to_networkx(mask: UnitGrid, values: torch.Tensor | None = None, source: str = "in", target: str = "out") -> Any:
    """A ``networkx.DiGraph`` from nodes (``source``, j) to nodes (``target``, i), with ``weight`` if values are given.

    All neurons are nodes, with their ``group``; equal names of both sides make one population of them.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.full(GroupLayout(2, 1), GroupLayout(3, 1), block_size=1)
        >>> list(to_networkx(mask).edges)[:2]
        [(('in', 0), ('out', 0)), (('in', 0), ('out', 1))]
    """
    if source == target and mask.shape[0] != mask.shape[1]:
        raise ValueError(f"source={source!r} is also the target, but {mask.shape[1]} inputs are not {mask.shape[0]}")
    graph = _optional("networkx").DiGraph()
    for name, axis in ((source, mask.cols), (target, mask.rows)):
        for neuron, group in enumerate(axis.layout.group_of.tolist()):
            graph.add_node((name, neuron), group=group)
    listed = edges(mask, values)
    pairs = zip(listed.source.tolist(), listed.target.tolist(), strict=True)
    attributes = [{}] * len(listed.source) if listed.weight is None else [{"weight": w} for w in listed.weight.tolist()]
    graph.add_edges_from(((source, j), (target, i), each) for (j, i), each in zip(pairs, attributes, strict=True))
    return graph


def to_string(mask: UnitGrid, max_cells: int = 64) -> str:
    """A picture of the unit grid, one character per cell: ``█`` all units of the cell present, ``░`` none. Grids larger
    than ``max_cells`` have several units per cell: ``▒`` up to half of them present, ``▓`` more.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> print(to_string(BlockMask.sample(GroupLayout(4, 2), GroupLayout(8, 2), p_inter=0.0, block_size=1)))
        ████░░░░
        ████░░░░
        ░░░░████
        ░░░░████
    """
    grid = _averaged(mask, *(min(side, max_cells) for side in mask.grid))

    def character(present: float) -> str:
        return "░" if present == 0 else "█" if present == 1 else "▒" if present <= 0.5 else "▓"

    return "\n".join("".join(map(character, line)) for line in grid.tolist())


#: how dark each character of a picture is in a notebook
SHADES = {"▒": 0.3, "▓": 0.6, "█": 1.0}


def to_html(mask: UnitGrid) -> str:
    """The mask for a notebook: what ``repr`` says, and its picture.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> "<svg" in to_html(BlockMask.sample(GroupLayout(16), GroupLayout(16), block_size=2))
        True
    """
    return f"<div><code>{html.escape(repr(mask))}</code>{picture(mask)}</div>"


def picture(mask: UnitGrid) -> str:
    """The picture of :func:`to_string` as an HTML element, with squares for characters."""
    lines = to_string(mask).splitlines()
    paths = {character: "" for character in SHADES}
    for y, line in enumerate(lines):
        for run in re.finditer("▒+|▓+|█+", line):
            paths[run[0][0]] += f"M{run.start()} {y}h{len(run[0])}v1H{run.start()}z"
    drawn = "".join(f'<path d="{path}" fill-opacity="{SHADES[character]}"/>' for character, path in paths.items())
    size = f'viewBox="0 0 {len(lines[0])} {len(lines)}" width="{4 * max(len(lines[0]), 16)}"'
    return f'<svg {size} shape-rendering="crispEdges" style="background: #eee; display: block">{drawn}</svg>'


def _averaged(mask: UnitGrid, height: int, width: int) -> torch.Tensor:
    """The share of units that exist in each cell of a grid of that size."""
    rows, cols = mask.grid
    cell = (mask.unit_row.long() * height // rows) * width + mask.unit_col.long() * width // cols
    units = [
        torch.bincount(torch.arange(side) * cells // side, minlength=cells)
        for side, cells in ((rows, height), (cols, width))
    ]
    count = torch.bincount(cell.cpu(), minlength=height * width).view(height, width)
    return count / (units[0][:, None] * units[1])


def _entries(mask: UnitGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, column and place among the packed values of each weight that exists, int64 [E], by row, then by column."""
    rows, cols = (
        axis.neuron_at.view(axis.num_units, axis.width)[unit.long()]
        for axis, unit in ((mask.rows, mask.unit_row), (mask.cols, mask.unit_col))
    )
    place = mask.valid().flatten().nonzero()[:, 0]
    row = rows[:, :, None].expand(mask.num_units, *mask.unit_shape).flatten()[place]
    col = cols[:, None, :].expand(mask.num_units, *mask.unit_shape).flatten()[place]
    order = torch.argsort(row * mask.cols.size + col)
    return row[order], col[order], place[order]


def _pointer(mask: UnitGrid, row: torch.Tensor) -> torch.Tensor:
    """int64 [out + 1], where each row's entries begin."""
    per_row = torch.bincount(row, minlength=mask.rows.size)
    return torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])


def _weights(mask: UnitGrid, values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    mask.check_values(values)
    weights = values.detach().reshape(-1)[place]
    return weights.to("cpu", torch.promote_types(weights.dtype, torch.float32))


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed, which this needs; pip install {name}") from error
