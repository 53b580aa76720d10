"""How fast g2g is, against the libraries that people use today: ``python -m benchmarks.throughput --help``.

Installed, this package is called ``g2g_benchmarks`` (``benchmarks`` would claim a common name), so its modules import
one another relatively.
"""
