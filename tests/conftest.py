"""How the tests are dealt out to processes; what holds for each of them is in ``every_test.py``."""

import os
import secrets
from pathlib import Path

import pytest
from quick import QUICK

#: files whose tests take longest: they begin first, so that no process works long after the others have ended
SLOWEST = [
    "g2gnet/training/test_distributed.py", "benchmarks/test_benchmarks.py", "g2g_kernels/ops/test_triton_g2g_stack.py",
    "g2g_kernels/test_cpu_backend.py", "g2gnet/training/test_reliability.py", "g2gnet/programs/test_report.py",
    "g2g_kernels/ops/test_triton_lif.py", "g2gnet/test_recurrence.py", "g2gnet/test_drop_in.py", "test_docs.py",
    "g2g_kernels/ops/test_models.py", "g2g_kernels/ops/test_triton_linear.py", "g2gnet/test_untrusted.py",
    "g2gnet/dst/test_dst.py", "benchmarks/test_aot.py", "g2gnet/data/test_recordings.py",
    "g2gnet/test_spiking_network.py", "g2gnet/programs/test_progress.py", "benchmarks/test_studies.py",
    "g2gnet/programs/test_sweep.py", "g2gnet/training/test_compiled_training.py", "g2gnet/training/test_training.py",
    "g2gnet/test_wide_layers.py", "g2gnet/weights/test_weights_and_wiring.py",
]  # fmt: skip
TESTS = Path(__file__).parent
collect_ignore = ["clients"]  # they need other libraries, in an environment of their own: tests/clients.sh


def pytest_xdist_auto_num_workers(config):
    """Processes for ``-n logical``: one per core for the whole suite, this one alone for files that are named."""
    return 0 if config.option.file_or_dir else None


def pytest_ignore_collect(collection_path, config):
    """``-m quick`` and ``-m ci`` read only the files that they have tests in."""
    if collection_path.suffix != ".py":
        return None
    if config.option.markexpr == "ci":
        return "pytest.mark.ci" not in collection_path.read_text(encoding="utf-8")
    if config.option.markexpr == "quick":
        return str(collection_path.relative_to(TESTS).as_posix()) not in {name.partition("::")[0] for name in QUICK}
    return None


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr == "long":  # files that draw cases are tried with others
        for item in items:
            if "drawn_cases" in vars(item.module) or "every_pair" in vars(item.module):
                item.add_marker(pytest.mark.long)
    quick = set(QUICK)
    for item in items:
        place = item.path.relative_to(TESTS).as_posix() if TESTS in item.path.parents else ""
        for name in {f"{place}::{item.name}", f"{place}::{item.originalname}"} & quick:
            quick.remove(name)
            item.add_marker(pytest.mark.quick)
    first = [path for pattern in SLOWEST for path in sorted(TESTS.glob(pattern))]
    items.sort(key=lambda item: first.index(item.path) if item.path in first else len(first))


def pytest_configure(config):
    """The process that only deals the tests out does without PyTorch, and begins so much earlier; the others have its
    variables."""
    if config.option.markexpr == "long":
        os.environ.setdefault("G2G_CASES", secrets.token_hex(4))
    if config.option.dist == "no" or config.option.collectonly:
        config.pluginmanager.import_plugin("every_test")


def pytest_terminal_summary(terminalreporter):
    if seed := os.environ.get("G2G_CASES"):
        terminalreporter.write_line(f"G2G_CASES={seed} pytest runs the same cases again")
