"""States of packed weights: what a saved one must have to be loaded, and those that were given out."""

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from g2g_kernels import BlockMask

if TYPE_CHECKING:
    from g2gnet.packed_weights import PackedWeights


class GivenStates:
    """States that a layer gave out, while someone keeps them.

    Their weights are the layer's own, and change with them; their wiring is a copy.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]]] = []

    def add(self, state: Mapping[str, Any], prefix: str) -> None:
        """Notes the state of a layer ``prefix``, which is in someone's hands."""
        values, wiring = (weakref.ref(state[prefix + name]) for name in ("values", "mask.wiring"))
        self._tensors = [kept for kept in self._tensors if kept[0]() is not None]
        self._tensors.append((values, wiring))

    def rewired(self, layer: "PackedWeights") -> None:
        """Has the states whose weights are still those of ``layer`` describe its mask."""
        for values, wiring in self._tensors:
            kept, row = values(), wiring()
            if kept is not None and row is not None and kept.data_ptr() == layer.values.data_ptr():
                row.data = layer.mask.state_dict()["wiring"]


def mask_to_load(layer: "PackedWeights", state: Mapping[str, Any], prefix: str) -> BlockMask | None:
    """The mask of a layer ``prefix`` in a state, if it fits that layer and the weights beside it; None if it stays.

    Raises:
        ValueError: if it does not fit.
    """
    if f"{prefix}mask.unit_row" in state:
        raise ValueError(
            f"{prefix}mask.unit_row was saved by a version that described masks by several tensors; now it is one, "
            f"{prefix}mask.wiring. Train the network again; or save dense_weight() of each layer with that version and "
            "pass BlockMask.from_dense(weight != 0), units of single weights, to G2GLinear.from_linear"
        )
    wiring = state.get(f"{prefix}mask.wiring")
    if wiring is None:
        return None
    if layer.has_plain_values:
        values = state.get(f"{prefix}values")
        _check_that_both_are_there(values, wiring, prefix)
        mask = _mask_from(wiring, layer.mask.shape, prefix)
        _check_that_they_fit(values, mask, prefix)
        return mask
    if not _mask_from(wiring, layer.mask.shape, prefix).equals(layer.mask):
        raise ValueError(
            f"{prefix}mask differs from the layer's, whose weights a parametrization (or pruning, or a norm) computes; "
            "load the state into a layer of the same wiring, or before that was registered"
        )
    return None


def _check_that_both_are_there(values: Any, wiring: Any, prefix: str) -> None:
    if values is None:
        raise ValueError(
            f"{prefix}values and its mask are loaded together or not at all, and the state lacks {prefix}values; save "
            "the whole state_dict() of the layer"
        )
    for name, tensor in (("values", values), ("mask.wiring", wiring)):
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ValueError(f"{prefix}{name} is on the device meta, which has no numbers to load")


def _check_that_they_fit(values: Any, mask: BlockMask, prefix: str) -> None:
    packed = (mask.num_units, *mask.unit_shape)
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"{prefix}values must be a floating-point tensor, not {kind}")
    if tuple(values.shape) != packed:
        raise ValueError(f"size mismatch for {prefix}values: {tuple(values.shape)}, but its mask has units {packed}")


def _mask_from(wiring: Any, shape: tuple[int, int], prefix: str) -> BlockMask:
    """The mask of that shape that ``wiring`` describes; raises ValueError if it describes none."""
    try:
        if not isinstance(wiring, torch.Tensor):
            raise ValueError(f"wiring must be a tensor, not {type(wiring).__name__}")
        return BlockMask.from_state({"wiring": wiring}, shape)
    except ValueError as error:
        raise ValueError(f"{prefix}mask: {error}") from error
