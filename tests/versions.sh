#!/bin/sh
# Runs the tests with several versions of PyTorch, each in an environment of its own; README names those that pass.
# "oldest" has the oldest versions that pyproject.toml allows, on the oldest Python; the others are README's command with
# that PyTorch installed before, and a NumPy that the interpreters of their Tritons know. By hand and before a release: each
# takes as long as all tests do, and 6 GB.
# G2G_VERSIONS=FOLDER keeps the environments for the next time; PYTEST_ADDOPTS has arguments of pytest.
# Usage: tests/versions.sh [oldest] [newest] [2.8] ...
set -eu
cd "$(dirname "$0")/.."
if [ -z "${G2G_VERSIONS:-}" ]; then
    G2G_VERSIONS=$(mktemp -d)
    trap 'rm -rf "$G2G_VERSIONS"' EXIT
fi

make_oldest() {
    python3.10 -m venv "$environment" &&
        # setuptools builds g2g, also in tests, and has no version 77.0; pyparsing and protobuf: newer ones than these
        # versions know
        python3 tests/oldest.py events interop plots tensorboard test | grep -v '^setuptools==' >"$environment/oldest.txt" &&
        "$environment/bin/pip" install -q -r "$environment/oldest.txt" hypothesis "setuptools>=77" \
            "protobuf<3.20" "pyparsing<3.1"
}

# Not the Triton kernels, which need a newer Triton, nor style, types, packages and pages, which need newer tools.
# Warnings of versions that are no longer maintained, most of them about themselves; NumPy's, of numbers that are flushed
# to zero while a network trains.
test_oldest() {
    PYTHONPATH=$PWD "$environment/bin/python" -m pytest -n logical -W ignore::FutureWarning \
        -W ignore::DeprecationWarning -W "ignore:The value of the smallest subnormal:UserWarning" \
        tests/g2gnet tests/g2g_kernels --ignore-glob='*triton*'
}

make_with() {
    "${PYTHON:-python3}" -m venv "$environment" && "$environment/bin/pip" install -q "$1" torchvision "$2"
}

test_readme() {
    (PATH="$environment/bin:$PATH" && pip install -q -e ".[test]" && pytest)
}

if [ $# -eq 0 ]; then set -- oldest 2.6 2.8 2.10 2.12 newest; fi
failed=
for version; do
    echo "== PyTorch: $version"
    environment=$G2G_VERSIONS/$version
    case $version in
    oldest) make=make_oldest tests=test_oldest ;;
    newest) make="make_with torch numpy" tests=test_readme ;;
    *) make="make_with torch==$version.* numpy<2.4" tests=test_readme ;;
    esac
    if { [ -e "$environment/complete" ] || { $make && touch "$environment/complete"; }; } && $tests; then continue; fi
    failed="$failed $version"
done
echo "failed:${failed:- none}"
[ -z "$failed" ]
