"""The peers, one module per library, each in its fastest form; ``benchmarks/README.md`` says how to add one.

A module declares its peers as literals, so that nobody needs a library that is not there: ``PEERS`` has the name, the
class (which derives from one in :mod:`benchmarks.contender`) and the kernels that each is timed in, ``NEEDS`` what the
module imports.
"""
