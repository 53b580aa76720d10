"""Whole numbers in buffers, which averages over all buffers leave as they are.

``AveragedModel(use_buffers=True)`` and others multiply a buffer of integers by their decay, and truncate: 3 becomes 2.
Floats are only rounded. So whole numbers are kept in float32, whatever the dtype of the weights, and are rounded where
they are read. Parameters that are checked on loading keep their dtype, too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from g2g_kernels.tracing import default_device, is_traced, is_transformed, unwrapped, version


class WholeBuffers(nn.Module):
    """A module with buffers of whole numbers. :meth:`settle` checks and reads a buffer that was written, or replaced
    (``torch.func.functional_call``); compiled code reads it without a check."""

    def __init__(self) -> None:
        super().__init__()
        #: by name: the buffer as it was read last, its version then, and its numbers, int64
        self._whole: dict[str, tuple[torch.Tensor | None, int, torch.Tensor]] = {}
        #: buffers that older versions did not save
        self._newer: set[str] = set()

    def register_whole(self, name: str, numbers: torch.Tensor, newer: bool = False) -> None:
        """Registers a buffer of whole numbers."""
        numbers = numbers.to(default_device())
        buffer = numbers.to(torch.float32)
        self.register_buffer(name, buffer)
        self._whole[name] = buffer, version(buffer), numbers.long()
        self._newer |= {name} if newer else set()

    def fitted(self, name: str, given: torch.Tensor, where: str) -> torch.Tensor:
        """What the buffer ``name`` becomes when it is given these numbers, in its shape. Raises ValueError, which
        begins with ``where``, if they do not fit."""
        if given.is_floating_point() and (given.abs() > 2 / torch.finfo(given.dtype).eps).any():
            raise ValueError(f"{where} holds whole numbers that {given.dtype} has rounded; keep them in float32")
        return given.to(torch.float32).round()

    def agree(self, fitted: Mapping[str, torch.Tensor]) -> None:
        """Takes note of new numbers. Raises ValueError if they do not go together."""

    def checked(self) -> Collection[str]:
        """The names of what is checked on loading."""
        return self._whole

    def whole(self, name: str) -> torch.Tensor:
        """The numbers of a buffer, int64, as :meth:`settle` read them."""
        return self._buffers[name].round().long() if is_traced() else self._whole[name][2]  # type: ignore[union-attr]

    def settle(self) -> None:
        """Reads the buffers that were written since they were read last. Raises ValueError if one does not fit."""
        if is_traced():
            return
        written = []
        for name, (known, at_version, _) in self._whole.items():
            buffer = self._buffers[name]
            # −1: made in inference mode, where PyTorch counts no writes
            if buffer is not known or not (at_version < 0 or buffer._version == at_version):  # type: ignore[union-attr]
                written.append(name)
        if written:
            self._read_whole(written)

    @torch.inference_mode(False)  # gradients may need what is kept
    def _read_whole(self, names: Sequence[str]) -> None:
        fitted, read = {}, {}
        for name in names:
            buffer, own = self.get_buffer(name), self._whole[name][2]
            rows = unwrapped(buffer).detach().reshape(-1, *buffer.shape)  # several under vmap
            numbers = rows[0].round().long()
            if not buffer.is_meta:
                if len(rows) > 1 and not (rows == rows[:1]).all():
                    raise ValueError(f"networks of different {name} cannot share one torch.func.vmap; call each alone")
                if own.is_meta or not torch.equal(numbers.to(own.device), own):
                    fitted[name] = self.fitted(name, rows[0], f"{name} was written to, and")
                    numbers = fitted[name].long()
            read[name] = None if is_transformed() else buffer, version(buffer), numbers
        self.agree(fitted)
        self._whole |= read

    def _apply(self, fn: Callable, recurse: bool = True) -> "WholeBuffers":
        mine = {**self._buffers, **self._parameters}
        kept = [mine[name] for name in self.checked() if mine.get(name) is not None]
        exact = {id(each) for tensor in kept for each in (tensor, tensor.grad)}  # type: ignore[union-attr]

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            to = fn(tensor)
            return tensor.to(to.device) if id(tensor) in exact and to.dtype != tensor.dtype else to

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        refused, fitted = set(), {}
        for name in self.checked():
            saved = state_dict.get(prefix + name)
            if not isinstance(saved, torch.Tensor) or type(saved.data) is not torch.Tensor or saved.is_meta:
                continue  # a shard, or what PyTorch refuses
            try:
                fitted[name] = state_dict[prefix + name] = self.fitted(name, saved.detach(), f"{prefix}{name}")
            except ValueError as error:
                error_msgs.append(str(error))
                refused.add(prefix + name)
        try:
            self.agree(fitted)
        except ValueError as error:
            error_msgs.append(str(error))
            refused |= {prefix + name for name in fitted}
        for key in refused:
            del state_dict[key]
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key not in refused and key.removeprefix(prefix) not in self._newer]
