"""Benchmarks run in one process, since pytest-benchmark times nothing in parallel."""


def pytest_xdist_auto_num_workers():
    """Processes for the ``-n logical`` of ``pyproject.toml``."""
    return 0
