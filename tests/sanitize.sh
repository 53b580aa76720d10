#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the parity tests on them.
# The sources are the same for every instruction set: checked are the kernels of this CPU's own, with EVERY_ISA=1 all.
# G2G_SANITIZED=FOLDER keeps the library for the next time; tests/sanitize.sh --build makes it and no more.
# tests/sanitized.sha256 has the digest of the sources that have passed, and is written when all these tests pass;
# tests/sanitize.sh --passed says whether the sources are those: then .ci/run, which has ten minutes, leaves them out.
# Usage: tests/sanitize.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
digest() { cat g2g_kernels/csrc/*.cpp g2g_kernels/csrc/*.h | sha256sum | cut -d ' ' -f 1; }
if [ "${1:-}" = --passed ]; then
    [ "$(digest)" = "$(cat tests/sanitized.sha256)" ]
    exit
fi
if [ -z "${G2G_SANITIZED:-}" ]; then
    G2G_SANITIZED=$(mktemp -d)
    trap 'rm -rf "$G2G_SANITIZED"' EXIT
fi
export G2G_CXXFLAGS="-Og -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
export G2G_CPU_LIBRARY="$G2G_SANITIZED/libg2g_cpu.so"
others='' every=''
if [ -z "${EVERY_ISA:-}" ]; then
    own=baseline every=' and not instruction_set'
    for flag in avx2 avx512f avx512_bf16; do  # as csrc/api.cpp chooses
        if grep -qsw $flag /proc/cpuinfo; then own=${flag%f}; fi
    done
    if ! grep -qsw avx512_vbmi2 /proc/cpuinfo; then own=${own%_bf16}; fi
    for each in baseline avx2 avx512 avx512_bf16; do
        if [ $each != $own ]; then others="$others $each"; fi
    done
fi
# shellcheck disable=SC2086
python tests/build_kernels.py "$G2G_CPU_LIBRARY" $others
if [ "${1:-}" = --build ]; then exit; fi
compiler=${CXX:-c++}
# Python is not instrumented, so the runtime comes first; its leaks are not ours
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS="detect_leaks=0" UBSAN_OPTIONS="print_stacktrace=1"
export G2G_CPU_POOL=0  # memory maps have no guard zones, malloc has
passed=/dev/null
if [ $# -eq 0 ]; then
    passed=tests/sanitized.sha256
    # PyTorch's side of the operators, which opcheck and its compiler test, is in the lane ci. Tests of rounding at large
    # sizes call the kernels of the other tests, and take three quarters of the time.
    set -- -n 2 --dist load tests/g2g_kernels/test_cpu_backend.py tests/g2g_kernels/test_lists.py \
        tests/g2g_kernels/ops/test_graphs.py tests/g2gnet/test_recurrence.py \
        -k "not memory and not errors_are and not differ_by_rounding and not denormal and (not test_recurrence or cpu)$every"
fi
python -m pytest -q -p no:cacheprovider "$@"
digest >$passed
