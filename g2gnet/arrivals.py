"""Masks that arrive as wirings: written into the buffer of a layer's mask, or put in its place for a while."""

import torch

from g2g_kernels import BlockMask
from g2g_kernels.wiring import read_row, unwrapped, version


class Received:
    """Finds the masks that others write into the buffer of a layer's mask.

    DistributedDataParallel does so when it is created: it broadcasts buffers, so that networks that were drawn
    differently become equal.
    """

    def __init__(self) -> None:
        #: the buffer in which something was found last, and its version then
        self._found: tuple[torch.Tensor, int] | None = None

    def mask(self, own: BlockMask) -> BlockMask | None:
        """The mask that was written over that of ``own``, if any; content that describes no mask is ignored.

        Data-parallel processes broadcast the same buffers at every step. Checking a change waits for the device, so in
        training mode only the first one is checked.
        """
        wiring, now = own.own_wiring, version(own.own_wiring)
        if now == own.written:
            return None
        if self._found is not None and self._found[0] is wiring and (own.training or self._found[1] == now):
            return None
        self._found = wiring, now
        sent = wiring.detach().cpu()
        if own.describes(sent):
            return None
        try:
            return BlockMask(*read_row(sent, own.shape))
        except ValueError:
            return None


def is_replaced(mask: BlockMask) -> bool:
    """Whether another buffer stands in place of the mask's own.

    ``torch.func.functional_call`` puts one there, with the parameters and buffers of another network.
    """
    return mask.wiring is not mask.own_wiring


def current_mask(mask: BlockMask) -> BlockMask:
    """The mask; or while another buffer stands in place of its own, what that one describes.

    Raises:
        ValueError: if it describes no mask (two wirings were averaged, say), or under ``torch.func.vmap`` several.
    """
    if not is_replaced(mask):
        return mask
    rows = unwrapped(mask.wiring).detach()
    sent = rows.reshape(-1, rows.shape[-1]).cpu()
    if not (sent == sent[:1]).all():
        raise ValueError(
            "networks with different wirings cannot run in one torch.func.vmap, whose networks share their indices; "
            "call them one by one"
        )
    if mask.describes(sent[0]):
        return mask
    try:
        described = BlockMask(*read_row(sent[0], mask.shape))
    except ValueError as error:
        raise ValueError(
            f"the buffer in place of mask.wiring describes no mask of this layer ({error}); pass parameters and "
            "buffers of one network"
        ) from error
    return described.to(mask.wiring.device)
