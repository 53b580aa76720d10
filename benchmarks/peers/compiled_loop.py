"""snnTorch's loop over time steps through ``torch.compile``.

The whole loop is one unrolled graph: the compiler finds that ``fc1`` has the same input and ``weight * mask`` the same
value at every step, and fuses the neurons of a step. (Compiling one step and calling it from a Python loop gains almost
nothing.) The graph grows with T and takes a minute or so to compile at the first call, which is not
part of the time but shown next to it.
"""

from ..contender import CompiledContender
from . import snntorch_loop

PEERS = (("compiled-masked", "MaskedLoop", ("step", "forward")), ("compiled-dense", "DenseLoop", ("step", "forward")))
NEEDS = ("snntorch", "a C++ compiler")


class MaskedLoop(CompiledContender, snntorch_loop.MaskedLoop):
    """The loop with dense weights times a mask."""


class DenseLoop(CompiledContender, snntorch_loop.DenseLoop):
    """The loop with dense weights."""
