"""The graph of a :class:`BlockMask` in other forms: lists of edges, matrices of SciPy and PyTorch, networkx, pictures.

Rows are output neurons (targets), columns input neurons (sources), both in neuron order, as in ``mask.to_dense()``.
"""

import base64
import html
import importlib
import struct
import zlib
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from g2g_kernels.mask.unit_grid import UnitGrid

#: pixels of the longer side of a picture; a larger grid of units is averaged
PICTURE = 256


class Edges(NamedTuple):
    """The weights that exist, sorted by target, then by source.

    Attributes:
        source, target: int64 [E], the input and the output neuron.
        source_group, target_group: int64 [E], their groups.
        weight: floating point [E], or None if only a mask was given.
    """

    source: np.ndarray
    target: np.ndarray
    source_group: np.ndarray
    target_group: np.ndarray
    weight: np.ndarray | None

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with one row per edge."""
        columns = {name: column for name, column in self._asdict().items() if column is not None}
        return _optional("pandas").DataFrame(columns)


class _Entries(NamedTuple):
    """The weights that exist, by row and then by column: int64 [E] each, ``place`` among the packed values."""

    row: torch.Tensor
    col: torch.Tensor
    place: torch.Tensor


def edges(mask: UnitGrid, values: torch.Tensor | None = None) -> Edges:
    """The list of edges, on the CPU; with the packed ``values`` also their weights, in float32 or float64.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.full(GroupLayout(2, 1), GroupLayout(3, 1), block_size=1)
        >>> edges(mask).source, edges(mask).target
        (array([0, 1, 2, 0, 1, 2]), array([0, 0, 0, 1, 1, 1]))
    """
    entries = _entries(mask)
    source, target = entries.col.cpu(), entries.row.cpu()
    source_group, target_group = mask.cols.layout.group_of[source], mask.rows.layout.group_of[target]
    weight = None if values is None else _weights(mask, values, entries).numpy()
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

    entries = _entries(mask)
    data = np.ones(len(entries.row), bool) if values is None else _weights(mask, values, entries).numpy()
    return csr_array((data, entries.col.cpu().numpy(), _pointer(mask, entries).cpu().numpy()), shape=mask.shape)


def to_csr(mask: UnitGrid, values: torch.Tensor) -> torch.Tensor:
    """The weight as a CSR tensor [out, in] on the device of ``values``, whose dtype it has; differentiable.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.sample(GroupLayout(16), GroupLayout(16), block_size=2)
        >>> to_csr(mask, mask.pack(torch.ones(16, 16))).shape
        torch.Size([16, 16])
    """
    mask.check_values(values)
    entries = _entries(mask)
    data = values.reshape(-1)[entries.place]
    return torch.sparse_csr_tensor(_pointer(mask, entries), entries.col, data, mask.shape, check_invariants=False)


def to_bsr(mask: UnitGrid, values: torch.Tensor, order: str = "neuron") -> torch.Tensor:
    """The weight as a BSR tensor [out, in] whose blocks are the units; differentiable.

    Args:
        mask: needs units of one size: no group cut into unequal ranges.
        values: the packed weights.
        order: ``"neuron"``, for contiguous groups; or ``"group"``, for any: rows are then the neurons
            ``mask.rows.order``, columns ``mask.cols.order``.

    Raises:
        ValueError: if units differ in size, or groups are not contiguous and ``order`` is ``"neuron"``.

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
    if listed.weight is None:
        graph.add_edges_from(((source, j), (target, i)) for j, i in pairs)
    else:
        weights = listed.weight.tolist()
        graph.add_weighted_edges_from(
            ((source, j), (target, i), weight) for (j, i), weight in zip(pairs, weights, strict=True)
        )
    return graph


# --- pictures ----------------------------------------------------------------------------------------------------


def to_string(mask: UnitGrid, max_cells: int = 64) -> str:
    """A picture of the unit grid, one character per cell: ``█`` all units of the cell present, ``░`` none.

    A grid larger than ``max_cells`` in either direction is drawn with several units per cell; ``▒`` means up to
    half of them present, ``▓`` more than half.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> print(to_string(BlockMask.sample(GroupLayout(4, 2), GroupLayout(8, 2), p_inter=0.0, block_size=1)))
        ████░░░░
        ████░░░░
        ░░░░████
        ░░░░████
    """
    grid = mask.present().cpu().float()[None, None]
    if max(mask.grid) > max_cells:
        height, width = (min(side, max_cells) for side in mask.grid)
        grid = nn.functional.adaptive_avg_pool2d(grid, (height, width))

    def character(present: float) -> str:
        return "░" if present == 0 else "█" if present == 1 else "▒" if present <= 0.5 else "▓"

    return "\n".join("".join(map(character, line)) for line in grid[0, 0].tolist())


def to_png(mask: UnitGrid) -> bytes:
    """A picture of the unit grid as a PNG file: dark where units exist, in group order, outputs from top to bottom.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> to_png(BlockMask.sample(GroupLayout(16), GroupLayout(16), block_size=2))[:4]
        b'\x89PNG'
    """
    grid = mask.present().cpu().float()
    height, width = grid.shape
    if max(height, width) > PICTURE:
        height, width = (max(1, round(side * PICTURE / max(grid.shape))) for side in grid.shape)
        grid = nn.functional.adaptive_avg_pool2d(grid[None, None], (height, width))[0, 0]
    scale = max(1, PICTURE // max(height, width))
    grey = (240 - 200 * grid).round().to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    lines = b"".join(b"\0" + line.numpy().tobytes() for line in grey)  # no filter
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)  # 8 bits of grey
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def to_html(mask: UnitGrid) -> str:
    """The mask for a notebook: what ``repr`` says, and its picture.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> "<img" in to_html(BlockMask.sample(GroupLayout(16), GroupLayout(16), block_size=2))
        True
    """
    return f"<div><code>{html.escape(repr(mask))}</code><br>{picture(mask)}</div>"


def picture(mask: UnitGrid) -> str:
    """The picture of a mask as an HTML element."""
    data = base64.b64encode(to_png(mask)).decode()
    rows, cols = mask.grid
    return f'<img src="data:image/png;base64,{data}" alt="{rows} × {cols} units" title="{rows} × {cols} units">'


# --- parts -------------------------------------------------------------------------------------------------------


def _entries(mask: UnitGrid) -> _Entries:
    rows, cols = (
        axis.neuron_at.view(axis.num_units, axis.width)[unit.long()]
        for axis, unit in ((mask.rows, mask.unit_row), (mask.cols, mask.unit_col))
    )
    place = mask.valid().flatten().nonzero()[:, 0]
    row = rows[:, :, None].expand(mask.num_units, *mask.unit_shape).flatten()[place]
    col = cols[:, None, :].expand(mask.num_units, *mask.unit_shape).flatten()[place]
    order = torch.argsort(row * mask.cols.size + col)
    return _Entries(row[order], col[order], place[order])


def _pointer(mask: UnitGrid, entries: _Entries) -> torch.Tensor:
    """int64 [out + 1], where each row's entries begin."""
    per_row = torch.bincount(entries.row, minlength=mask.rows.size)
    return torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])


def _weights(mask: UnitGrid, values: torch.Tensor, entries: _Entries) -> torch.Tensor:
    mask.check_values(values)
    weights = values.detach().reshape(-1)[entries.place]
    return weights.to("cpu", torch.promote_types(weights.dtype, torch.float32))


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed, which this needs; pip install {name}") from error
