"""The gradient of units that do not exist, for rules that grow where it is large."""

import torch

from g2g_kernels import BlockMask


class AbsentGradient:
    """Gives absent units of a layer a gradient too: while it is set, the layer runs with every unit.

    Absent units are zero, so the layer computes the same output with the same kernels (by events if the input is
    spikes), and its own weights get the same gradient. The gradients of all units of the grid are summed over backward
    passes in ``total``.

    Args:
        mask: the layer's.

    Attributes:
        mask: the mask of every unit; slot u holds unit u of the grid, counted row by row.
        total: ∂L/∂W so far, [block rows · block columns, unit_rows, unit_cols], or None.
    """

    def __init__(self, mask: BlockMask) -> None:
        self.mask = mask.filled()
        self.total: torch.Tensor | None = None

    def expand(self, values: torch.Tensor, mask: BlockMask) -> tuple[torch.Tensor, BlockMask]:
        """The same weights with every unit: packed values and their mask."""
        units = values.new_zeros(self.mask.num_units, *mask.unit_shape).index_copy(0, mask.flat_unit(), values)
        units.register_hook(self._add)
        return units, self.mask

    def _add(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().float()
        self.total = gradient.clone() if self.total is None else self.total + gradient

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the layer takes no part in the step
