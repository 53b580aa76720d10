#!/bin/sh
# Executes the Triton kernels without a GPU: values, races, accesses out of bounds, and what compiler passes do to values.
# Usage: tests/execute_kernels.sh [pytest arguments], on Linux (x86-64); PYTHON names a Python 3.12 or 3.13.
# G2G_TTSEM names a folder for the environment (5.7 GB), made once and kept; without it one is made and removed.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
environment=${G2G_TTSEM:-$scratch/environment}
if [ ! -e "$environment/complete" ]; then
    "${PYTHON:-python3.13}" -m venv "$environment"
    "$environment/bin/pip" install -q ttsem==0.1.0 triton==3.8.0 torch==2.14.0 torchvision \
        hypothesis pytest pytest-xdist scikit-learn snntorch tqdm
    touch "$environment/complete"
fi
export PYTHONPATH="$PWD:$PWD/tests" TRITON_CACHE_DIR="$scratch/triton" OMP_NUM_THREADS=1 G2G_CPU_LIBRARY=none
if [ $# -eq 0 ]; then
    set -- -n 2 --dist load tests/g2g_kernels/ops/test_triton_*.py tests/g2g_kernels/ops/test_models.py \
        tests/g2g_kernels/ops/test_extreme_values.py -k "triton or extreme"
fi
"$environment/bin/python" -m pytest -q -p kernel_execution -p no:cacheprovider -m "not driver" "$@"
