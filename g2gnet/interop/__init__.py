"""Networks to and from snnTorch and the exchange format NIR, which ``g2gnet[interop]`` installs, and to C."""

from g2gnet.interop.c_code import to_c
from g2gnet.interop.nir import from_nir, to_nir
from g2gnet.interop.quantized import QuantizedNetwork, quantize
from g2gnet.interop.snntorch import from_snntorch, to_snntorch

__all__ = ["QuantizedNetwork", "from_nir", "from_snntorch", "quantize", "to_c", "to_nir", "to_snntorch"]
