"""Several processes that work on one run, as started by ``torchrun``: what they share and agree on."""

import atexit
import contextlib
import datetime
import gc
import hashlib
import logging
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its functions would keep as their default

from g2gnet.base.messages import reason

logger = logging.getLogger("g2gnet")

#: PyTorch's communication for each kind of device; tensors on the CPU always go through gloo
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
#: for how long processes wait for one another, unless told otherwise
LIMIT = datetime.timedelta(minutes=30)
NO_LIMIT = datetime.timedelta(days=3650)
#: seconds after which a process says what it waits for
PATIENCE = 10.0
#: the time that a process which gives up has to tell the others, and to hear them
FAREWELL = datetime.timedelta(seconds=5)

ResultT = TypeVar("ResultT")


class DistributedError(RuntimeError):
    """The processes of a run do not match, do not find one another, or diverged; the message says how."""


def _ranks(numbers: Iterable[int]) -> str:
    text = ", ".join(map(str, numbers))
    return f"rank{'s' if ',' in text else ''} {text}"


def _until(limit: datetime.timedelta, what: Callable[[], str]) -> Iterator[None]:
    """Looks again and again, up to the limit; after :data:`PATIENCE` it says once ``what`` this process waits for."""
    begin, said = time.monotonic(), False
    while (waited := time.monotonic() - begin) <= limit.total_seconds():
        if waited > PATIENCE and not said:
            said = True
            logger.warning("after %.0f seconds, %s", PATIENCE, what())
        yield


class World:
    """The processes that work on one run, PyTorch's ``group``; ``"world"``: all that ``torch.distributed`` has joined,
    if any; None: a single process, and nothing is sent. All of them must call every method except :meth:`part`."""

    def __init__(self, group: dist.ProcessGroup | str | None = None) -> None:
        self.group = dist.group.WORLD if isinstance(group, str) else group
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.stage = "start"  # what this process does, for messages
        self._work: dist.Work | None = None

    def apart(self) -> "World":
        """The same processes; they wait for any time for one another, but not for one that has ended."""
        if self.size == 1:
            return self
        group: Any = dist.new_group(timeout=NO_LIMIT)  # a number for those who are not in it; all are
        return World(group)

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of ``count`` samples: the parts are contiguous and differ by at most one sample."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Puts the sum over the processes into ``tensor``, bitwise equal in each, and returns it."""
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
        """What ``function`` returns in the first process, the only one that calls it; :func:`join` tells its error."""
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
        """Waits for the others before an operation of PyTorch that would wait without a word, deaf to Ctrl-C."""
        if self.size > 1 and "gloo" in dist.get_backend_config(self.group):
            self._wait(dist.barrier(self.group, async_op=True))

    def assemble(self) -> None:
        """Waits for the others; raises DistributedError if some do not come, which the first process names."""
        if self.group is None or "gloo" not in dist.get_backend_config(self.group):  # the next operation waits anyway
            return
        limit = self.group._get_backend(torch.device("cpu")).options._timeout  # unless told, it waits for half an hour
        try:
            dist.monitored_barrier(self.group, limit, wait_all_ranks=True)
        except RuntimeError as error:
            raise DistributedError(
                f"some processes did not come to {self.stage}: all must make the same calls, after the same optimizer "
                f"steps, and have equally many batches. PyTorch says: {reason(error)}"
            ) from error

    def _wait(self, work: dist.Work, device: str = "cpu") -> None:
        """Waits for an operation, a second at a time, so that Ctrl-C is heard; on a GPU only the device waits."""
        # kept as long as the group: gloo's thread, if it were the last to hold it, would need the interpreter's lock to
        # release it, and PyTorch 2.6 keeps that lock while it waits for the thread to end
        self._work = work
        text = f"rank {self.rank} of {self.size} still waits for another process, at {self.stage}"
        for _ in _until(NO_LIMIT, lambda: text) if device == "cpu" else ():  # the group has a limit
            with contextlib.suppress(RuntimeError):  # this second is over, or the operation has failed
                work.wait(datetime.timedelta(seconds=1))
            if work.is_completed():
                break
        work.wait()


#: one process by itself
ALONE = World()


class Meeting:
    """The store through which processes find one another: served by ``torchrun``, or else by rank 0."""

    def __init__(self, limit: datetime.timedelta) -> None:
        self.rank, self.size, self.limit = rank(), _variable("WORLD_SIZE"), limit
        self._address = host, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT")
        self._place = f"MASTER_ADDR={host}, MASTER_PORT={port}"
        if not host or not 0 < port < 1 << 16:
            raise DistributedError(f"{self._place} is no address; give that of rank 0, and a port from 1 to 65535")
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's own
        libuv = os.environ.get("USE_LIBUV", "1") == "1"
        try:
            if not serves:
                self._knock(limit)
            store = dist.TCPStore(
                host, port, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=True, use_libuv=libuv
            )
        except (OSError, RuntimeError) as error:
            raise DistributedError(
                f"cannot meet the other processes at {self._place} ({reason(error)}): give the address of rank 0's "
                "machine and a port that is free there and open to the others"
            ) from error
        # those of an attempt before torchrun started all anew are not asked
        self.store = dist.PrefixStore(f"g2g/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _knock(self, limit: datetime.timedelta) -> None:
        """Waits for an answer, where PyTorch's store would wait without a word, deaf to Ctrl-C; or raises OSError."""
        for _ in _until(limit, lambda: f"rank {self.rank} still waits for an answer at {self._place}"):
            with contextlib.suppress(OSError):
                return socket.create_connection(self._address, PATIENCE).close()
            time.sleep(0.2)
        socket.create_connection(self._address, PATIENCE).close()

    def collect(self, what: str, value: bytes, limit: datetime.timedelta) -> list[bytes]:
        """The values that all give, by rank; raises DistributedError if one has ended or stays silent."""
        self.store.set(f"{what}/{self.rank}", value)  # type: ignore[arg-type]  # it takes bytes, too
        silent = [*range(self.size)]
        for _ in _until(limit, lambda: f"rank {self.rank} of {self.size} has heard nothing from {_ranks(silent)}"):
            silent[:] = [other for other in silent if not self.store.check([f"{what}/{other}"])]
            if not silent:
                return [self.store.get(f"{what}/{other}") for other in range(self.size)]
            self.hear()
            time.sleep(0.05)
        raise DistributedError(
            f"heard nothing from {_ranks(silent)} for {self.limit.total_seconds():.4g} seconds: look what became of "
            "it, then run the same command again; `peer_timeout` sets this limit"
        )

    def agree(self, about: Mapping[str, Any]) -> None:
        """Raises DistributedError, in every process, unless all say the same of themselves; it names what differs."""
        theirs = [pickle.loads(each) for each in self.collect("about", pickle.dumps(about), self.limit)]
        lines = []
        for name, value in theirs[0].items():  # who knows no such name has another program or version
            said = [str(each.get(name, value)) for each in theirs]
            ranks = {text: _ranks(n for n, other in enumerate(said) if other == text) for text in dict.fromkeys(said)}
            if len(ranks) > 1:
                lines.append(f"  {name}: {', '.join(f'{text} in {of}' for text, of in ranks.items())}\n")
        if lines:
            with contextlib.suppress(RuntimeError):  # whoever serves the store, or stops torchrun, has to be the last
                self.collect("leaving", b"", FAREWELL)
            raise DistributedError(
                f"the processes do not match:\n{''.join(lines)}"
                "Start all with the same program, flags and versions (G2G_CPU_ISA sets the instruction set)."
            )

    def connect(self, backend: str) -> World:
        """All processes that have met, as PyTorch's group."""
        try:
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=self.limit)
        except (RuntimeError, ValueError) as error:
            self.hear()
            raise DistributedError(
                "the processes have met, but cannot connect to one another; GLOO_SOCKET_IFNAME names the network "
                f"interface to use. PyTorch says: {reason(error)}"
            ) from error
        return World("world")

    def hear(self) -> None:
        """Raises DistributedError if others have ended and said why."""
        if ended := [other for other in range(self.size) if self.store.check([f"ended/{other}"])]:
            reasons = (f"rank {other} has ended: {self.store.get(f'ended/{other}').decode()}" for other in ended)
            raise DistributedError("; ".join(reasons))

    def lost(self, error: RuntimeError, stage: str) -> NoReturn:
        """Raises DistributedError that says why a connection ended, or nothing came on it for too long."""
        what = f"lost the connection to {f'rank {1 - self.rank}' if self.size == 2 else 'another process'}"
        try:
            self._knock(datetime.timedelta())  # the store would print a traceback if it is gone
            self.store.set(f"waits/{self.rank}", stage)
            self.hear()
            if "imed out" in str(error):
                stages = enumerate(self.collect("waits", stage.encode(), FAREWELL))
                what = f"waited for one another: {', '.join(f'rank {each} at {at.decode()}' for each, at in stages)}"
        except (OSError, dist.DistError):  # the store is gone, too
            pass
        raise DistributedError(
            f"{what}; run the same command again to resume from the last checkpoint, with any number of processes. "
            f"PyTorch says: {reason(error)}"
        ) from error


def launched() -> bool:
    """Whether ``torchrun``, or a program that sets the same variables, started this process as one of several."""
    return "WORLD_SIZE" in os.environ and _variable("WORLD_SIZE") > 1


def rank(name: str = "RANK") -> int:
    """The number of this process, from 0; with ``"LOCAL_RANK"`` that among those on its machine."""
    return _variable(name) if launched() else 0


def _variable(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise DistributedError(
            f"the environment variable {name} is {value!r}, where torchrun sets a number; start several processes by "
            "torchrun, or unset WORLD_SIZE"
        )
    return int(value)


@contextlib.contextmanager
def join(
    device: torch.device, about: Mapping[str, Any] | None = None, peer_timeout: datetime.timedelta = LIMIT
) -> Iterator[World]:
    """The processes that ``torchrun`` started, while entered, to work together; :data:`ALONE` without it.

    This one computes on ``device``. What it says ``about`` itself must be the same in all. They wait for one another
    for ``peer_timeout``. Raises DistributedError for a device without a backend, if the processes do not match or meet,
    or one has ended.
    """
    if not launched():
        yield ALONE
        return
    if device.type not in BACKENDS:
        raise DistributedError(f"several processes need CPUs or CUDA, not {device}; start one, without torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting, world, interrupted = Meeting(peer_timeout), ALONE, False
    try:
        meeting.agree({"number of processes": meeting.size, **(about or {})})
        world = meeting.connect(BACKENDS[device.type])
        yield world
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        # gloo has no type of its own for lost connections; the process that ended tells why
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
            meeting.lost(error, world.stage)
        with contextlib.suppress(RuntimeError):  # the others should know
            meeting.store.set(f"ended/{meeting.rank}", str(error) or type(error).__name__)
        raise
    finally:
        # gloo's threads end with the last reference to the group, which may be in a cycle. One that still runs while
        # the interpreter is torn down, and asks for its lock, aborts the process.
        atexit.register(gc.collect)
        if dist.is_initialized() and not interrupted:  # gloo may still wait for the others, and leaving it would, too
            dist.destroy_process_group()
