"""Several processes that work on one run, as started by ``torchrun``: what they share and agree on."""

import atexit
import contextlib
import datetime
import gc
import hashlib
import importlib
import logging
import os
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from g2gnet.messages import reason

logger = logging.getLogger("g2gnet")

#: PyTorch's communication for each kind of device; tensors on the CPU always go through gloo
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
#: for how long processes wait for one another, unless told otherwise
LIMIT = datetime.timedelta(minutes=30)
#: seconds after which a process says what it waits for
PATIENCE = 10.0
#: the time that a process which gives up has to tell the others, and to hear them
FAREWELL = datetime.timedelta(seconds=5)

ResultT = TypeVar("ResultT")


class DistributedError(RuntimeError):
    """The processes of a run do not match, do not find one another, or diverged; the message says how."""


def _in_words(limit: datetime.timedelta) -> str:
    seconds = limit.total_seconds()
    return f"{seconds / 60:.4g} minutes" if seconds >= 120 else f"{seconds:.4g} seconds"


def _ranks(numbers: Iterable[int]) -> str:
    """``rank 1``, or ``ranks 1, 2``."""
    texts = [str(number) for number in numbers]
    return f"rank{'s' if len(texts) > 1 else ''} {', '.join(texts)}"


def _seconds(what: Callable[[str], str], limit: datetime.timedelta | None) -> Iterator[float]:
    """The seconds that a wait has taken, for each look; after :data:`PATIENCE` it says once ``what`` took so long."""
    begin, said = time.monotonic(), False
    while True:
        waited = time.monotonic() - begin
        if waited > PATIENCE and not said:
            said = True
            end = f"; it gives up after {_in_words(limit)} (`peer_timeout`)" if limit else ""
            logger.warning("%s%s", what(f"{PATIENCE:.0f} seconds"), end)
        yield waited


class World:
    """The processes that work on one run. All of them must call every method except :meth:`part`.

    Args:
        group: PyTorch's group of these processes; None: a single process, and nothing is sent.
        limit: for how long they wait for one another, for messages; None: it is not known.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        stage: what this process does now, for messages.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, limit: datetime.timedelta | None = None) -> None:
        self.group, self.limit = group, limit
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.stage = "start"

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

    def part(self, count: int) -> slice:
        """This process's part of ``count`` samples: the parts are contiguous and differ by at most one sample."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Puts the sum over the processes into ``tensor``, bitwise equal in each, and returns it."""
        if self.size > 1:
            self._wait(dist.all_reduce(tensor, group=self.group, async_op=True), tensor.device.type)
        return tensor

    def sum_gradients(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The sum over the processes of a bucket of gradients: a hook of DistributedDataParallel."""
        work = dist.all_reduce(bucket.buffer(), group=self.group, async_op=True)
        if bucket.is_last():  # this process has computed all of its gradients
            self._wait(work, bucket.buffer().device.type)
        return work.get_future().then(lambda future: future.value()[0])

    def largest(self, value: int) -> int:
        """The largest of the processes' values. Does not wait for a GPU."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
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
        """What ``function`` returns in the first process, the only one that calls it.

        Raises:
            Exception: what it raises; in the other processes, DistributedError with its message.
        """
        if self.size == 1:
            return function()
        sent: list[Any] = [None, None]
        failure: Exception | None = None
        if self.leads:
            try:
                sent[0] = function()
            except Exception as error:
                failure, sent[1] = error, str(error) or type(error).__name__
        self.arrive()
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(sent, source, group=self.group)
        if failure is not None:
            raise failure
        if sent[1] is not None:
            raise DistributedError(f"rank 0 has ended: {sent[1]}")
        return sent[0]

    def assemble(self) -> None:
        """Waits until all processes are here.

        Raises:
            DistributedError: in the first process, if others do not come within the group's time limit.
        """
        if self.size == 1:
            return
        # one call of PyTorch's, which says nothing while it waits
        told = threading.Timer(PATIENCE, lambda: logger.warning("%s", self._awaited(f"{PATIENCE:.0f} seconds")))
        told.daemon = True
        told.start()
        try:
            dist.monitored_barrier(self.group, self.limit, wait_all_ranks=True)
        except ValueError:  # a group without gloo, whose next operation waits in any case
            return
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))  # the first process's words
            raise DistributedError(
                f"{'rank ' + missing[1] if missing else 'another process'} did not come to {self.stage}: all processes "
                f"must make the same calls, after the same optimizer steps, and have equally many batches. PyTorch "
                f"says: {reason(error)}"
            ) from error
        finally:
            told.cancel()

    def check_same(self, what: str, value: Any, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Raises DistributedError, in every process, unless ``value`` and the tensors' bits are the same in all."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        values = self.gather((value, digest.digest()))
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise DistributedError(f"{what} of {_ranks(differing)} differs from that of rank 0")

    def arrive(self) -> None:
        """Waits for the others before an operation of PyTorch that would wait without a word, deaf to Ctrl-C."""
        if self.size > 1 and "gloo" in dist.get_backend_config(self.group):
            self._wait(dist.barrier(self.group, async_op=True))

    def _wait(self, work: dist.Work, device: str = "cpu") -> None:
        """Waits for an operation; on the CPU a second at a time, so that Ctrl-C is heard."""
        if device != "cpu":
            work.wait()  # only the device waits
            return
        for _ in _seconds(self._awaited, self.limit):
            with contextlib.suppress(RuntimeError):  # this second is over, or the operation has failed
                work.wait(datetime.timedelta(seconds=1))
            if work.is_completed():
                break
        work.wait()

    def _awaited(self, time: str) -> str:
        return f"rank {self.rank} of {self.size} has waited {time} for another process, at {self.stage}"


#: one process by itself
ALONE = World()


class Meeting:
    """The store through which processes find one another: served by ``torchrun``, or else by rank 0.

    Args:
        limit: for how long to wait for the others.

    Raises:
        DistributedError: if its address is invalid, or cannot be reached within the limit.
    """

    def __init__(self, limit: datetime.timedelta) -> None:
        self.rank, self.size, self.limit = rank(), _variable("WORLD_SIZE"), limit
        host, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT")
        if not host:
            raise DistributedError("the environment variable MASTER_ADDR is not set; give the address of rank 0")
        if not 0 < port < 1 << 16:
            raise DistributedError(f"MASTER_PORT={port} is no port; give a number from 1 to {(1 << 16) - 1}")
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's own
        self._address, place = (host, port), f"MASTER_ADDR={host}, MASTER_PORT={port}"
        for waited in _seconds(lambda time: f"rank {self.rank} has waited {time} for an answer at {place}", limit):
            try:
                if not serves:  # PyTorch's store would try as long without a word, deaf to Ctrl-C
                    socket.create_connection(self._address, PATIENCE).close()
                store = dist.TCPStore(
                    # the server listens at every address, the name of which may lead here from elsewhere only
                    "localhost" if serves else host,
                    port,
                    is_master=serves,
                    timeout=limit,
                    wait_for_workers=False,
                    multi_tenant=True,
                    use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
                )
                break
            except (OSError, RuntimeError) as error:
                if waited > limit.total_seconds() or isinstance(error, RuntimeError):
                    raise DistributedError(
                        f"cannot meet the other processes at {place} ({reason(error)}): give the address of rank 0's "
                        "machine and a port that is free there and open to the others"
                    ) from error
            time.sleep(0.2)
        # those of an attempt before torchrun started all anew are not asked
        self.store = dist.PrefixStore(f"g2g/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def collect(self, what: str, value: bytes, limit: datetime.timedelta) -> list[bytes]:
        """The values that all processes give, by rank.

        Raises:
            DistributedError: if one of them has ended, or is not heard of within the limit.
        """
        self.store.set(f"{what}/{self.rank}", value)  # type: ignore[arg-type]  # it takes bytes, too
        missing, pause = [*range(self.size)], 0.005
        heard = f"rank {self.rank} of {self.size} has heard nothing from"
        for waited in _seconds(lambda time: f"{heard} {_ranks(missing)} for {time}", limit):
            missing[:] = [other for other in missing if not self.store.check([f"{what}/{other}"])]
            if not missing:
                break
            if endings := self.endings():
                raise DistributedError(endings)
            if waited > limit.total_seconds():
                raise DistributedError(
                    f"heard nothing from {_ranks(missing)} for {_in_words(self.limit)}: look what became of it, then "
                    "run the same command again; `peer_timeout` sets this limit"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)
        return [self.store.get(f"{what}/{other}") for other in range(self.size)]

    def agree(self, about: Mapping[str, Any]) -> None:
        """Raises DistributedError, in every process, unless all say the same about themselves; it names what differs.

        Only ``program`` is named if that differs.
        """
        theirs = [pickle.loads(each) for each in self.collect("about", pickle.dumps(about), self.limit)]
        lines = []
        for name in dict.fromkeys(name for each in theirs for name in each):
            ranks: dict[str, list[int]] = {}
            for number, each in enumerate(theirs):
                ranks.setdefault(str(each.get(name, "not set")), []).append(number)
            if len(ranks) > 1:
                lines.append(f"  {name}: {', '.join(f'{value} in {_ranks(of)}' for value, of in ranks.items())}")
                if name == "program":
                    break
        if lines:
            with contextlib.suppress(RuntimeError):  # whoever serves the store, or stops torchrun, has to be the last
                self.collect("leaving", b"", FAREWELL)
            differing = "\n".join(lines)
            raise DistributedError(
                f"the processes do not match:\n{differing}\n"
                "Start all with the same program, flags and versions (G2G_CPU_ISA sets the instruction set)."
            )

    def connect(self, backend: str) -> World:
        """All processes that have met, as PyTorch's group."""
        # optimizers import this module, whose functions take the group at the time of that import as their default
        importlib.import_module("torch.distributed.nn")
        store = dist.PrefixStore("group", self.store)
        try:
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=self.limit)
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                "the processes have met, but cannot connect to one another; GLOO_SOCKET_IFNAME names the network "
                f"interface to use. PyTorch says: {reason(error)}"
            ) from error
        return World(dist.group.WORLD, self.limit)

    def tell(self, error: BaseException) -> None:
        """Lets the others know, if possible, why this process ends."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"ended/{self.rank}", str(error) or type(error).__name__)

    def endings(self) -> str:
        """Why other processes have ended, as far as they said it."""
        ended = [other for other in range(self.size) if self.store.check([f"ended/{other}"])]
        return "; ".join(f"rank {other} has ended: {self.store.get(f'ended/{other}').decode()}" for other in ended)

    def lost(self, error: RuntimeError, stage: str) -> DistributedError:
        """Why a connection ended, or nothing came on it for too long."""
        others = [other for other in range(self.size) if other != self.rank]
        what = f"lost the connection to {'another process' if len(others) > 1 else _ranks(others)}"
        try:
            socket.create_connection(self._address, PATIENCE).close()  # the store would print a traceback if it is gone
            self.store.set(f"waits/{self.rank}", stage)
            if endings := self.endings():
                return DistributedError(endings)
            if "imed out" in str(error):
                stages = enumerate(self.collect("waits", stage.encode(), FAREWELL))
                where = ", ".join(f"rank {each} at {text.decode()}" for each, text in stages)
                what = f"waited for one another: {where}"
        except DistributedError as silence:
            return silence
        except (OSError, RuntimeError):  # the store is gone, too
            pass
        return DistributedError(
            f"{what}; run the same command again to resume from the last checkpoint, with any number of processes. "
            f"PyTorch says: {reason(error)}"
        )


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
def join(
    device: torch.device, about: Mapping[str, Any] | None = None, peer_timeout: datetime.timedelta = LIMIT
) -> Iterator[World]:
    """The processes that ``torchrun`` started, while entered, to work together; :data:`ALONE` without it.

    Args:
        device: where this process computes.
        about: what must be the same in all.
        peer_timeout: for how long processes wait for one another.

    Raises:
        DistributedError: for a device without a communication backend, if the processes do not match or do not find
            one another, or when another process has ended.
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
    meeting, world, interrupted = Meeting(peer_timeout), ALONE, False
    try:
        meeting.agree({"number of processes": meeting.size, **(about or {})})
        world = meeting.connect(BACKENDS[device.type])
        yield world
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        # gloo has no type of its own for lost connections; the process that ended tells why
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
            raise meeting.lost(error, world.stage) from error
        meeting.tell(error)
        raise
    finally:
        # gloo's threads end with the last reference to the group, which may be in a cycle. One that still runs while
        # the interpreter is torn down, and asks for its lock, aborts the process.
        atexit.register(gc.collect)
        if dist.is_initialized() and not interrupted:  # gloo may still wait for the others, and leaving it would, too
            dist.destroy_process_group()


@contextlib.contextmanager
def apart(about: Mapping[str, Any], peer_timeout: datetime.timedelta = LIMIT) -> Iterator[World]:
    """The processes that ``torchrun`` started, while entered, to do work of their own; :data:`ALONE` without it.

    They wait for any time for one another's results, but not for a process that has ended.

    Args:
        about: what must be the same in all.
        peer_timeout: for how long to wait for the others at the beginning.

    Raises:
        DistributedError: as for :func:`join`.
    """
    with join(torch.device("cpu"), about, peer_timeout) as world:
        if world.size > 1:
            world = World(dist.new_group(timeout=datetime.timedelta(days=3650)))  # type: ignore[arg-type]  # all are in it
        yield world
