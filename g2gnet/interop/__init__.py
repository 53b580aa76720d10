"""Networks to and from other libraries: snnTorch, and the exchange format NIR. ``g2gnet[interop]`` installs both."""

from g2gnet.interop.nir import from_nir, to_nir
from g2gnet.interop.snntorch import from_snntorch, to_snntorch

__all__ = ["from_nir", "from_snntorch", "to_nir", "to_snntorch"]
