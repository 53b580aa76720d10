"""Several processes that work on one run, as started by ``torchrun``: their communication and agreement."""

import atexit
import contextlib
import datetime
import gc
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its functions would keep as their default

from g2gnet.base.messages import reason

logger = logging.getLogger("g2gnet")

#: PyTorch's communication by kind of device; tensors on the CPU always go through gloo
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
#: how long processes wait for one another by default
LIMIT = datetime.timedelta(minutes=30)
NO_LIMIT = datetime.timedelta(days=3650)
#: seconds after which a waiting process says where it waits
PATIENCE = 10

ResultT = TypeVar("ResultT")


class DistributedError(RuntimeError):
    """The processes of a run do not match, do not find one another, or diverged."""


def _ranks(numbers: Iterable[int]) -> str:
    text = ", ".join(map(str, numbers))
    return f"rank{'s' if ',' in text else ''} {text}"


class World:
    """The processes that work on one run, PyTorch's ``group``; ``"world"``: all that ``torch.distributed`` has joined;
    None: a single process, which sends nothing. All processes must call every method except :meth:`part`."""

    def __init__(self, group: dist.ProcessGroup | str | None = None) -> None:
        self.group = dist.group.WORLD if isinstance(group, str) else group
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.stage = "start"  # the work of this process, for messages
        self._work: dist.Work | None = None

    def apart(self) -> "World":
        """The same processes, which wait for one another without a limit, unless one ends."""
        if self.size == 1:
            return self
        group: Any = dist.new_group(timeout=NO_LIMIT)
        return World(group)

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of ``count`` samples. Parts are contiguous and differ by at most one sample."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces ``tensor`` by its sum over the processes, bitwise equal in all, and returns it."""
        if self.size > 1:
            self._wait(dist.all_reduce(tensor, group=self.group, async_op=True), tensor.device.type)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the processes' values. Does not wait for a GPU."""
        tensor = torch.tensor(value)
        if self.size > 1:
            self._wait(dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group, async_op=True))
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            self.arrive()
            dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, function: Callable[[], ResultT]) -> ResultT:
        """The result of ``function`` in the first process, which alone calls it."""
        result: Any = [function() if self.leads else None]
        if self.group is not None:
            self.arrive()
            dist.broadcast_object_list(result, dist.get_global_rank(self.group, 0), self.group)
        return result[0]

    def check_same(self, what: str, value: Any, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Raises DistributedError, in every process, unless ``value`` and the tensors' bits are the same in all."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        values = self.gather((value, digest.digest()))
        if differing := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise DistributedError(f"{what} of {_ranks(differing)} differs from that of rank 0")

    def arrive(self) -> None:
        """Waits for the others before an operation of PyTorch that would wait silently and ignore Ctrl-C."""
        if self.size > 1 and "gloo" in dist.get_backend_config(self.group):
            self._wait(dist.barrier(self.group, async_op=True))

    def assemble(self) -> None:
        """Waits for the others. Raises DistributedError if some do not come within the group's limit."""
        try:
            self.arrive()
        except RuntimeError as error:
            remedy = "all must make the same calls, after the same optimizer steps, and have equally many batches"
            text = f"some processes did not come to {self.stage}: {remedy}. PyTorch says: {reason(error)}"
            raise DistributedError(text) from error

    def agree(self, about: Mapping[str, Any]) -> None:
        """Raises DistributedError, in every process, if their entries ``about`` themselves differ; it names them."""
        self.stage = "the comparison of settings"
        theirs = self.gather(dict(about))
        lines = []
        for name, value in theirs[0].items():  # other programs and versions lack names
            said = [str(each.get(name, value)) for each in theirs]
            ranks = {text: _ranks(n for n, other in enumerate(said) if other == text) for text in dict.fromkeys(said)}
            if len(ranks) > 1:
                lines.append(f"  {name}: {', '.join(f'{text} in {of}' for text, of in ranks.items())}\n")
        if lines:
            with contextlib.suppress(RuntimeError):  # torchrun stops the others when the first one ends
                self.arrive()
            remedy = "Start all with the same program, flags and versions (G2G_CPU_ISA sets the instruction set)."
            raise DistributedError(f"the processes do not match:\n{''.join(lines)}{remedy}")

    def _wait(self, work: dist.Work, device: str = "cpu") -> None:
        """Waits for an operation, a second at a time, so that Ctrl-C is noticed; on a GPU only the device waits."""
        # kept as long as the group: if gloo's thread held the last reference, it would need the interpreter's lock to
        # release it, and PyTorch 2.6 keeps that lock while it waits for the thread to end
        self._work = work
        for second in itertools.count(1) if device == "cpu" else ():  # the group has a limit
            with contextlib.suppress(RuntimeError):  # this second is over, or the operation has failed
                work.wait(datetime.timedelta(seconds=1))
            if work.is_completed():
                break
            if second == PATIENCE:
                text = "after %d seconds, rank %d of %d still waits for another process, at %s"
                logger.warning(text, second, self.rank, self.size, self.stage)
        work.wait()


#: a single process
ALONE = World()


def launched() -> bool:
    """Whether ``torchrun``, or a program that sets its variables, started this process as one of several."""
    return "WORLD_SIZE" in os.environ and _variable("WORLD_SIZE") > 1


def rank(name: str = "RANK") -> int:
    """The number of this process, from 0; with ``"LOCAL_RANK"`` its number among those on its machine."""
    return _variable(name) if launched() else 0


def _variable(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        remedy = "start several processes by torchrun, or unset WORLD_SIZE"
        raise DistributedError(f"the environment variable {name} is {value!r}, where torchrun sets a number; {remedy}")
    return int(value)


@contextlib.contextmanager
def join(
    device: torch.device, about: Mapping[str, Any] | None = None, peer_timeout: datetime.timedelta = LIMIT
) -> Iterator[World]:
    """While entered, the processes that ``torchrun`` started work together; :data:`ALONE` without ``torchrun``.

    This process computes on ``device``; its entries ``about`` itself must be the same in all. Processes wait for one
    another for ``peer_timeout``. Raises DistributedError for a device without a backend, if the processes do not match
    or meet, or one has ended.
    """
    if not launched():
        yield ALONE
        return
    if device.type not in BACKENDS:
        raise DistributedError(f"several processes need CPUs or CUDA, not {device}; start one, without torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR', '')}, MASTER_PORT={_variable('MASTER_PORT')}"
    try:
        dist.init_process_group(BACKENDS[device.type], timeout=peer_timeout)
    except (OSError, RuntimeError, ValueError) as error:
        raise DistributedError(
            f"cannot meet the other processes at {address}: start all within `peer_timeout`; give the address of rank "
            "0's machine and a port that is free there and open to the others; GLOO_SOCKET_IFNAME names the network "
            f"interface to use. PyTorch says: {reason(error)}"
        ) from error
    world, interrupted = World("world"), False
    try:
        world.agree({"number of processes": world.size, **(about or {})})
        yield world
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        # gloo has no error type for lost connections
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
            other = f"rank {1 - world.rank}" if world.size == 2 else "another process"
            remedy = "run the same command again to resume from the last checkpoint, with any number of processes"
            text = f"lost the connection to {other}, at {world.stage}; {remedy}. PyTorch says: {reason(error)}"
            raise DistributedError(text) from error
        raise
    finally:
        # gloo's threads end with the last reference to the group, which may be in a cycle. A thread that asks for the
        # interpreter's lock while the interpreter is torn down aborts the process.
        atexit.register(gc.collect)
        if not interrupted:  # gloo may still wait for the others; leaving the group would wait, too
            dist.destroy_process_group()
