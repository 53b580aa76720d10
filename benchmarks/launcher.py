"""Triton's own launcher without a GPU: everything up to the call of the driver, which is left out."""

import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from g2g_kernels.triton.runtime import Launch


class _Utils:
    """What Triton asks an H100's driver for."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "max_num_regs": 1 << 16, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 64, 0, 1024  # module, function, registers, stack, most threads

    def unload_module(self, module: int) -> None:
        pass


class _NoLaunch:
    """In place of what calls the driver."""

    launch_cooperative_grid = False

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _Driver:
    """The driver of a GPU of Hopper's architecture that is not there."""

    utils = _Utils()
    launcher_cls = _NoLaunch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launcher_seconds(launches: Sequence[Launch], repeats: int) -> list[float]:
    """Seconds of CPU time of all ``launches`` one after the other, ``repeats`` times; their kernels are compiled first.

    Each launch counts with its least time among ten, since it takes a few microseconds.
    """
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", _Driver()):
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments)
        return [sum(min(_seconds(launch) for _ in range(10)) for launch in launches) for _ in range(repeats)]


def _seconds(launch: Launch) -> float:
    start = time.process_time()
    launch.kernel[launch.grid](**launch.arguments)
    return time.process_time() - start
