"""Where a run computes: none of it decides what is computed."""

from typing import NamedTuple

import torch

from g2gnet.distributed import ALONE, World


class Machine(NamedTuple):
    """The device of this process, the kernels it uses, and the processes it works with.

    Attributes:
        device: where to compute.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.
        world: the processes that make the same calls, this one among them.
        cuda_graph: replay each whole batch's step as a CUDA graph.
    """

    device: torch.device
    backend: str | None = None
    world: World = ALONE
    cuda_graph: bool = False
