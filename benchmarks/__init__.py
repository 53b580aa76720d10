"""How fast g2g is, beside the libraries that people use today: ``python -m benchmarks.throughput --help``."""
