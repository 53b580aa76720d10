#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the parity tests on them.
# Usage: tests/sanitize.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export G2G_CXXFLAGS="-Og -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
export G2G_CPU_LIBRARY="$scratch/libg2g_cpu.so"
python -c "
from pathlib import Path
from setup import build_library
build_library(Path('$G2G_CPU_LIBRARY'), Path('$scratch'))"
compiler=${CXX:-c++}
# Python is not instrumented, so the runtime comes first; its leaks are not ours
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS="detect_leaks=0" UBSAN_OPTIONS="print_stacktrace=1"
export G2G_CPU_POOL=0  # memory maps have no guard zones, malloc has
if [ $# -eq 0 ]; then
    # opcheck and the compiler test PyTorch's side of the operators, and take minutes under the sanitizers
    set -- -n 2 --dist load tests/g2g_kernels/test_cpu_backend.py tests/g2gnet/test_recurrence.py \
        -k "(test_cpu_backend and not opcheck and not full_graph) or (test_recurrence and cpu)"
fi
python -m pytest -q -p no:cacheprovider "$@"
