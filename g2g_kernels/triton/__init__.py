"""Shared parts of the Triton kernels: where they can run (:mod:`.runtime`), device functions of neurons
(:mod:`.neuron`) and of products (:mod:`.products`).

Kernels are in their operators' folders (``ops/*/triton.py``). Importing this package does not import Triton.
"""
