"""Networks to and from other libraries: snnTorch, and the exchange format NIR; and to NeuroBench's harness.

``g2g[interop]`` installs the first two, ``pip install neurobench`` the last.
"""

from g2gnet.interop.neurobench import to_neurobench
from g2gnet.interop.nir import from_nir, to_nir
from g2gnet.interop.snntorch import from_snntorch, to_snntorch

__all__ = ["from_nir", "from_snntorch", "to_neurobench", "to_nir", "to_snntorch"]
