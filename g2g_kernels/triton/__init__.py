"""What the Triton kernels share: where they can run (:mod:`.runtime`), LIF device functions (:mod:`.neuron`).

Kernels stand in their operators' folders (``ops/*/triton.py``). Importing this package does not import Triton.
"""
