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
# every line of these kernels is one of those for AVX-512 with bfloat16, too
plain=$(if grep -qs avx512_bf16 /proc/cpuinfo; then echo avx512; fi)
# shellcheck disable=SC2086
python tests/build_kernels.py "$G2G_CPU_LIBRARY" $plain
if [ "${1:-}" = --build ]; then exit; fi
compiler=${CXX:-c++}
# Python is not instrumented, so the runtime comes first; its leaks are not ours
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS="detect_leaks=0" UBSAN_OPTIONS="print_stacktrace=1"
export G2G_CPU_POOL=0  # memory maps have no guard zones, malloc has
if [ $# -eq 0 ]; then
    # PyTorch's side of the operators, which opcheck and its compiler test, is in the lane ci
    set -- -n 2 --dist load tests/g2g_kernels/test_cpu_backend.py tests/g2g_kernels/test_lists.py \
        tests/g2g_kernels/ops/test_graphs.py tests/g2g_kernels/ops/test_late_stacks.py tests/g2gnet/test_recurrence.py \
        -k "not memory and (not test_recurrence or cpu)"
fi
python -m pytest -q -p no:cacheprovider "$@"
