"""snnTorch's loop over time steps through ``torch.compile``.

The whole loop is one unrolled graph: the compiler finds that ``fc1`` has the same input and ``weight * mask`` the same
value at every step, and fuses the neurons of a step. (Compiling one step and calling it from a Python loop gains almost
nothing.) The graph grows with T and takes a minute or so to compile at the first call, which is not
part of the time but shown beside it.
"""

import torch

from ..contender import NetworkContender
from ..workload import Prepared
from . import snntorch_loop

PEERS = (
    ("compiled-masked", "MaskedLoop", ("step", "forward")),
    ("compiled-dense", "DenseLoop", ("step", "forward")),
)
NEEDS = ("snntorch", "a C++ compiler")


class _Compiled(NetworkContender):
    apart = True  # compiled once more to keep spikes: eagerly a GPU would round otherwise

    def __init__(self, prepared: Prepared, device: torch.device, precision: str, compiler: str = "inductor") -> None:
        super().__init__(prepared, device, precision)
        self.net.compile(fullgraph=True, backend=compiler)


class MaskedLoop(_Compiled, snntorch_loop.MaskedLoop):
    """The loop with dense weights times a mask."""


class DenseLoop(_Compiled, snntorch_loop.DenseLoop):
    """The loop with dense weights."""
