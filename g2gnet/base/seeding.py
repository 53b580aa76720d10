"""Random numbers that resume: each draw has a stream named by seed, purpose and counters, equal in all processes."""

import os
import random

import numpy as np
import torch

#: the purposes, one stream each
STREAMS = (
    "network", "order", "encode_train", "encode_test", "dst",
    "augment", "encode_val", "dropout", "permutation", "erase", "validation", "candidates",
    "unit_shift",
)  # fmt: skip


def stream(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose (see :data:`STREAMS`) at one count, such as the epoch or the step."""
    entropy = np.random.SeedSequence([seed, STREAMS.index(purpose), *counters])
    generator = torch.Generator(device=device)
    return generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)


def draw_device(device: torch.device) -> torch.device:
    """Where to draw random numbers for ``device``: there if it has generators (CPU, CUDA), else on the CPU."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def make_deterministic(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch and restricts PyTorch to deterministic algorithms."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs to be deterministic
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # it would also fill every new tensor with NaN: one more pass over outputs that kernels overwrite anyway
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
