"""How fast g2g is, beside the libraries that people use today: ``python -m benchmarks.throughput --help``.

Installed, this package is called ``g2g_benchmarks`` (``benchmarks`` would claim that name for everyone), so its modules
import one another relatively.
"""
