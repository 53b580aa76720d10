"""How the neurons of one population are divided into groups. :mod:`g2g_kernels.mask.block_mask` connects them."""

from collections.abc import Sequence
from typing import Any

import torch

from g2g_kernels.numbers import SIZE
from g2g_kernels.tracing import on_cpu

#: the relative rounding error of an average of equal numbers: that of 200 networks, summed one by one
ROUNDING = 2.0**-18

GROUP_KINDS = ("index", "interleaved", "random")


class GroupLayout:
    """A division of ``size`` neurons into ``num_groups`` groups, or into contiguous groups of these ``sizes``.

    Without ``sizes``, the sizes of groups differ by at most one; the first ``size % num_groups`` groups are larger (10
    neurons in 8 groups: 2, 2, 1, 1, 1, 1, 1, 1). The kind ``"index"`` gives contiguous ranges, ``"interleaved"`` group
    = i mod ``num_groups``, and ``"random"`` a balanced assignment drawn from ``generator`` (None: PyTorch's).

    Attributes:
        group_of: int64 tensor [size] on the CPU, the group of each neuron.

    Raises:
        ValueError: for an unknown kind, or sizes that leave a group without a neuron.

    Example:
        >>> layout = GroupLayout(6, num_groups=2, kind="interleaved")
        >>> layout.group_of
        tensor([0, 1, 0, 1, 0, 1])
        >>> layout.sizes
        tensor([3, 3])
        >>> GroupLayout(sizes=[4, 1]).group_of
        tensor([0, 0, 0, 0, 1])
    """

    @on_cpu
    def __init__(
        self,
        size: int | None = None,
        num_groups: int = 8,
        kind: str = "index",
        generator: torch.Generator | None = None,
        *,
        sizes: Sequence[int] | None = None,
    ) -> None:
        if kind not in GROUP_KINDS:
            raise ValueError(f"kind={kind!r} is not a group layout; choose one of {', '.join(GROUP_KINDS)}")
        self.kind = kind
        if sizes is not None:
            if not isinstance(sizes, list | tuple) or not sizes:
                raise ValueError(f"sizes={sizes!r:.60} must be a list of the neurons of each group, at least one")
            if size is not None or kind != "index":
                raise ValueError(f"sizes={sizes!r:.60} are of contiguous groups; give neither size nor kind with them")
            counts = [SIZE.check(f"sizes[{group}]", each) for group, each in enumerate(sizes)]
            self.size, self.num_groups = SIZE.check("the sum of sizes", sum(counts)), len(counts)
        else:
            self.size, self.num_groups = SIZE.check("size", size), SIZE.check("num_groups", num_groups)
            least, larger = divmod(self.size, self.num_groups)
            if not least:
                raise ValueError(
                    f"{size} neurons cannot fill num_groups={num_groups} groups; use at most {size} groups"
                )
            counts = [least + 1] * larger + [least] * (self.num_groups - larger)
        self.group_of = torch.repeat_interleave(torch.arange(self.num_groups), torch.tensor(counts))
        if kind == "interleaved":
            self.group_of = torch.arange(self.size) % self.num_groups
        elif kind == "random":
            self.group_of = self.group_of[torch.randperm(self.size, generator=generator)]

    @classmethod
    @on_cpu
    def from_assignment(cls, group_of: torch.Tensor) -> "GroupLayout":
        """The layout with an assignment, int64 [size], 0 … G−1. Raises ValueError if it leaves a group empty."""
        group_of = check_integers("group_of", group_of).detach().to("cpu", torch.int64)
        if group_of.dim() != 1 or group_of.numel() == 0 or group_of.min() < 0 or group_of.max() >= group_of.numel():
            raise ValueError(f"group_of must hold group numbers 0 … G−1 for a row of neurons, not {group_of}")
        num_groups = int(group_of.max()) + 1
        sizes = torch.bincount(group_of, minlength=num_groups)
        if sizes.min() == 0:
            raise ValueError(f"group_of leaves group {int(sizes.argmin())} of {num_groups} without a neuron")
        layout = cls(group_of.numel(), num_groups)
        if not (group_of.diff() >= 0).all():
            interleaved = torch.equal(torch.arange(group_of.numel()) % num_groups, group_of)
            layout.kind = "interleaved" if interleaved else "random"
        layout.group_of = group_of.clone()
        return layout

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupLayout":
        return self  # it never changes

    @property
    def sizes(self) -> torch.Tensor:
        """int64 tensor [num_groups], the number of neurons in each group."""
        return torch.bincount(self.group_of, minlength=self.num_groups)

    def __repr__(self) -> str:
        return f"GroupLayout({self.size}, num_groups={self.num_groups}, kind={self.kind!r})"


def partners(out_groups: int, in_groups: int) -> torch.Tensor:
    """Which groups of two sides belong together, those of the same number: bool [groups out, groups in]. If one side
    has only G of G' groups, its group g belongs to every g' with ⌊g'·G/G'⌋ = g."""
    least = min(out_groups, in_groups)
    out_group, in_group = (torch.arange(count) * least // count for count in (out_groups, in_groups))
    return out_group[:, None] == in_group[None, :]


def as_integers(name: str, tensor: object) -> torch.Tensor:
    """An integer tensor, or the integers in a tensor of floats, which averages of a ``state_dict`` make of all. Raises
    ValueError for anything else, and for numbers that are not whole or too large for the dtype to be exact."""
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
        given = tensor.detach().nan_to_num(0.5)
        whole = given.round()
        if not bool(((given - whole).abs() <= ROUNDING * whole.abs()).all()):
            raise ValueError(
                f"{name} holds numbers that are not whole, as an average of networks with different wirings does; "
                "average networks of the same wiring"
            )
        if not bool((whole.abs() <= 2 / torch.finfo(tensor.dtype).eps).all()):
            raise ValueError(f"{name} holds integers that {tensor.dtype} has rounded; keep them as integers")
        return whole.long()
    return check_integers(name, tensor)


def check_integers(name: str, tensor: object) -> torch.Tensor:
    """``tensor``; raises ValueError, naming the argument, unless it is a tensor of integers."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor of integers, not {type(tensor).__name__}")
    if tensor.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"{name} must be a tensor of integers, not of {tensor.dtype}")
    return tensor
