"""Where a run computes; this does not change what is computed."""

from typing import NamedTuple

import torch

from g2g_kernels import available_backends
from g2g_kernels.cpu.library import instruction_set
from g2g_kernels.dispatch import forced_backend
from g2gnet.base.distributed import ALONE, World
from g2gnet.base.version import __version__


class Machine(NamedTuple):
    """The device of this process, the backend (None lets the device decide), the processes that make the same calls,
    and whether training steps are replayed as a CUDA graph (None: where that is possible).

    Example:
        >>> Machine(torch.device("cpu"), backend="torch").captures
        False
    """

    device: torch.device
    backend: str | None = None
    world: World = ALONE
    cuda_graph: bool | None = None

    @property
    def captures(self) -> bool:
        """Whether training steps are replayed as a CUDA graph."""
        return self.device.type == "cuda" and self.world.size == 1 if self.cuda_graph is None else self.cuda_graph

    def versions(self) -> dict[str, str]:
        """What the last bits of a result depend on besides the settings, in words."""
        backend = forced_backend(self.backend)
        if backend is None:
            preferred = {"cuda": "triton", "cpu": "cpu"}.get(self.device.type, "torch")
            backend = preferred if preferred in available_backends() else "torch"
        return {
            "g2g": __version__,
            "torch": str(torch.__version__),
            "device": self.device.type,
            "backend": backend,
            "instruction set": instruction_set() if backend == "cpu" else "PyTorch's own",
        }
