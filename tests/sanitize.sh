#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the parity tests on them.
# G2G_SANITIZED=FOLDER keeps the library for the next time; tests/sanitize.sh --build makes it and no more.
# Usage: tests/sanitize.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
if [ -z "${G2G_SANITIZED:-}" ]; then
    G2G_SANITIZED=$(mktemp -d)
    trap 'rm -rf "$G2G_SANITIZED"' EXIT
fi
export G2G_CXXFLAGS="-Og -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
export G2G_CPU_LIBRARY="$G2G_SANITIZED/libg2g_cpu.so"
python tests/build_kernels.py "$G2G_CPU_LIBRARY"
if [ "${1:-}" = --build ]; then exit; fi
compiler=${CXX:-c++}
# Python is not instrumented, so the runtime comes first; its leaks are not ours
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS="detect_leaks=0" UBSAN_OPTIONS="print_stacktrace=1"
export G2G_CPU_POOL=0  # memory maps have no guard zones, malloc has
if [ $# -eq 0 ]; then
    # opcheck and the compiler test PyTorch's side of the operators, and take minutes under the sanitizers
    set -- -n 2 --dist load tests/g2g_kernels/test_cpu_backend.py tests/g2g_kernels/test_lists.py \
        tests/g2gnet/test_recurrence.py \
        -k "(test_cpu_backend and not opcheck and not full_graph) or (test_lists and not sound and not memory) or (test_recurrence and cpu)"
fi
python -m pytest -q -p no:cacheprovider "$@"
