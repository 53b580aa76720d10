"""Does it matter who connects to whom over time? ``python -m benchmarks.recurrent_structure_study``.

The graphs of :mod:`benchmarks.structure_study` in recurrent networks that read images row by row (T 28). The settings
are those of :mod:`benchmarks.sequence_study`, and so are the sizes: a quarter of the weights in units of 16, and a
twentieth in units of 4. Connections between layers and those within a layer are of the same graph.
"""

import sys
from collections.abc import Sequence

from .dst_study import density_flags
from .sequence_study import COMMON
from .structure_study import rows_of, table
from .study import Study, run_study

#: a share of the weights, and units
SIZES = {
    f"{percent} %, units of {side}": f"--block_size {side} {density_flags(percent)}"
    for percent, side in ((25, 16), (5, 4))
}

STUDY = Study(
    "recurrent_structure_study",
    __doc__,
    f"{COMMON} --sequence rows --recurrent --density erk",
    rows_of(SIZES),
    3,
    table,
    seeds=(1, 2, 3, 4, 5),
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
