"""Lists the programs, and the kernels that this machine can run."""

import sys
from collections.abc import Sequence

from g2g_kernels import backend_status
from g2gnet.base.version import __version__
from g2gnet.programs import flags

#: the purpose of each program
PROGRAMS = {
    "g2g-train": "trains a network: dense, or sparse between groups, statically or dynamically",
    "g2g-crossval": "cross-validates one: k models, each validated on another k-th of the training images",
    "g2g-sweep": "trains every combination of several settings and seeds, in parallel; means and errors",
    "g2g-bench": "times g2g against snnTorch, SpikingJelly and PyTorch's own sparse products",
    "g2g-analyze": "prints the activity of a trained network's neurons, by layer and group",
    "g2g-report": "writes a page with settings, results, analysis and pictures of runs",
    "g2g-export": "writes a trained network as C, in floats or in integers of few bits",
    "g2g-pretrain": "trains the CIFAR ResNet-32 whose features --use_resnet uses",
    "python -m g2g_kernels.doctor": "checks every kernel of this machine against the reference",
}


def main(argv: Sequence[str] | None = None) -> int:
    flags.Parser(prog="python -m g2gnet", description=__doc__).parse_args(argv)
    width = max(map(len, PROGRAMS))
    print(f"g2g {__version__}\n\nPrograms; each explains itself with --help:")
    for program, purpose in PROGRAMS.items():
        print(f"  {program:{width}}  {purpose}")
    print("\nKernels on this machine:")
    for backend, reason in backend_status().items():
        print(f"  {backend:{width}}  {'yes' if reason is None else f'no: {reason}'}")
    print("\nTo start:\n  g2g-train --dataset fashionmnist-mini --model mixer --epochs 5")
    return 0


if __name__ == "__main__":
    sys.exit(main())
