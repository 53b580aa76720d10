"""Several processes that work on one run, as started by ``torchrun``: what they share and agree on."""

import atexit
import contextlib
import datetime
import gc
import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

#: PyTorch's communication for each kind of device; tensors on the CPU always go through gloo
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class DistributedError(RuntimeError):
    """The processes of a run do not match, or their states diverged; the message says what differs."""


class World:
    """The processes that work on one run. All of them must call every method except :meth:`share`.

    Args:
        group: PyTorch's group of these processes; None: a single process, and nothing is sent.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, group: dist.ProcessGroup | str | None) -> "World":
        """The processes of a group; of ``"world"`` all that ``torch.distributed`` has joined, or this one alone."""
        if isinstance(group, str):
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        return cls(group)

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` samples: the parts are contiguous and differ by at most one sample."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Puts the sum over the processes into ``tensor``, bitwise equal in each, and returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the processes' values. Does not wait for a GPU."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.largest(0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_same(self, what: str, value: Any, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Raises DistributedError, in every process, unless ``value`` and the tensors' bits are the same in all."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().numpy().tobytes())
        values = self.gather((value, digest.digest()))
        differing = [str(rank) for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise DistributedError(f"{what} of rank {', '.join(differing)} differs from that of rank 0")


#: one process by itself
ALONE = World()


def launched() -> bool:
    """Whether ``torchrun``, or a program that sets the same variables, started this process as one of several.

    Raises:
        DistributedError: if the variables are not those of ``torchrun``; so do the two functions below.
    """
    return "WORLD_SIZE" in os.environ and _variable("WORLD_SIZE") > 1


def rank() -> int:
    """The number of this process, from 0."""
    return _variable("RANK") if launched() else 0


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return _variable("LOCAL_RANK") if launched() else 0


def _variable(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise DistributedError(
            f"the environment variable {name} is {value!r}, where torchrun sets a number; start several processes by "
            "torchrun, or unset WORLD_SIZE"
        )
    return int(value)


@contextlib.contextmanager
def join(device: torch.device, timeout: datetime.timedelta | None = None) -> Iterator[World]:
    """The processes that ``torchrun`` started, while entered; :data:`ALONE` without it.

    Args:
        device: where this process computes.
        timeout: how long processes wait for one another (None: PyTorch's default, some minutes).

    Raises:
        DistributedError: for a device without a communication backend, or when another process has ended.
    """
    if not launched():
        yield ALONE
        return
    if device.type not in BACKENDS:
        raise DistributedError(
            f"several processes need CPUs or CUDA devices, not {device}; start one, without torchrun"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Its functions keep the group of the moment of their import as a default, and optimizers import it.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group(BACKENDS[device.type], timeout=timeout)
    try:
        yield World(dist.group.WORLD)
    except RuntimeError as error:
        # gloo has no type of its own for them
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise DistributedError(
                "lost the connection to another process; run the same command again to resume from the last "
                f"checkpoint, with any number of processes. PyTorch says: {error}"
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        # gloo's threads end with the last reference to the group, which may be in a cycle. One that still runs while
        # the interpreter is torn down, and asks for its lock, aborts the process.
        atexit.register(gc.collect)
