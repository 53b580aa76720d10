#!/bin/sh
# Runs the tests of the CPU kernels on a library that clang has made, unoptimised: optimising takes four times as long.
# Usage: tests/clang.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export G2G_CPU_LIBRARY="$scratch/libg2g_cpu.so"
CXX=clang++ G2G_CXXFLAGS=-O0 python tests/build_kernels.py "$G2G_CPU_LIBRARY"
if [ $# -eq 0 ]; then
    # opcheck and the compiler test PyTorch's side of the operators, which no C++ compiler makes
    set -- -n 2 --dist load tests/g2g_kernels/test_cpu_backend.py -k "not opcheck and not full_graph"
fi
python -m pytest -q -p no:cacheprovider "$@"
