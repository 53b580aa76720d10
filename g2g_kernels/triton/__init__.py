"""Shared parts of the kernels in ``ops/*/triton.py``: where they can run (:mod:`.runtime`), device functions of neurons
(:mod:`.neuron`) and of products (:mod:`.products`). Importing this package does not import Triton."""
