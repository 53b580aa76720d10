#!/bin/sh
# Runs the tests with the oldest versions that pyproject.toml allows, on the oldest Python: what is declared is true.
# It makes its own environment (6 GB with PyPI's PyTorch; G2G_OLDEST=FOLDER keeps it for the next time).
# Usage: PYTHON=python3.10 tests/oldest.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
if [ -z "${G2G_OLDEST:-}" ]; then
    G2G_OLDEST=$(mktemp -d)
    trap 'rm -rf "$G2G_OLDEST"' EXIT
fi
if [ ! -x "$G2G_OLDEST/bin/python" ]; then
    "${PYTHON:-python3.10}" -m venv "$G2G_OLDEST"
    # setuptools builds g2g, also in tests, and has no version 77.0; pyparsing and protobuf: newer ones than these
    # versions know
    python3 tests/oldest.py interop plots tensorboard test | grep -v '^setuptools==' >"$G2G_OLDEST/oldest.txt"
    "$G2G_OLDEST/bin/pip" install -r "$G2G_OLDEST/oldest.txt" hypothesis "setuptools>=77" \
        "protobuf<3.20" "pyparsing<3.1"
fi
if [ $# -eq 0 ]; then
    # not the Triton kernels, which need a newer Triton, nor style, types, packages and pages, which need newer tools
    set -- tests/g2gnet tests/g2g_kernels tests/programs --ignore-glob='*triton*'
fi
# warnings of versions that are no longer maintained, most of them about themselves; NumPy's, of numbers that are flushed to
# zero while a network trains
PYTHONPATH=$PWD "$G2G_OLDEST/bin/python" -m pytest -W ignore::FutureWarning -W ignore::DeprecationWarning \
    -W "ignore:The value of the smallest subnormal:UserWarning" "$@"
