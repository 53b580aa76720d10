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
import queue
import re
import socket
import threading
import time
import weakref
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
#: seconds between two signs of life
PULSE = 2.0
#: seconds for which a process that is to end waits until the others know why
FAREWELL = 5.0

ResultT = TypeVar("ResultT")


class DistributedError(RuntimeError):
    """The processes of a run do not match, do not find one another, or diverged; the message says how."""


class LostConnectionError(DistributedError):
    """Another process has ended or does not answer: the consequence of something else."""


# --- waiting ------------------------------------------------------------------------------------------------------


class _Watch:
    """Says what this process waits for, once for each wait of :data:`PATIENCE` seconds.

    A thread of its own says it: the main one is inside PyTorch. It sends nothing, so a lost link does not silence it.
    """

    def __init__(self) -> None:
        self._now: tuple[float, Callable[[], str]] | None = None  # since when, and for what
        self._thread: threading.Thread | None = None

    def begin(self, what: Callable[[], str]) -> None:
        """From now on this process waits for what ``what`` returns."""
        self._now = time.monotonic(), what
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def end(self) -> None:
        self._now = None

    @contextlib.contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[None]:
        before = self._now
        self.begin(what)
        try:
            yield
        finally:
            self._now = before

    def _look(self) -> None:
        said = 0.0
        while True:
            time.sleep(PATIENCE / 10)
            said = self._say(said)

    def _say(self, said: float) -> float:
        """Says what this process waits for, unless it was said: returns the beginning of the last wait that was.

        Between two calls the thread keeps nothing of a group, which would not end with its last reference elsewhere.
        """
        now = self._now
        if now is None or now[0] == said or time.monotonic() - now[0] < PATIENCE:
            return said
        logger.warning("%s", now[1]())
        return now[0]


_watch = _Watch()


def _in_words(limit: datetime.timedelta) -> str:
    seconds = limit.total_seconds()
    return f"{seconds / 60:.4g} minutes" if seconds >= 120 else f"{seconds:.4g} seconds"


def _ranks(numbers: Iterable[int]) -> str:
    """``rank 1``, or ``ranks 1, 2``."""
    texts = [str(number) for number in numbers]
    return f"rank{'s' if len(texts) > 1 else ''} {', '.join(texts)}"


#: the time limits of groups, where they are known
_limits: "weakref.WeakKeyDictionary[dist.ProcessGroup, datetime.timedelta]" = weakref.WeakKeyDictionary()


# --- the processes ------------------------------------------------------------------------------------------------


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
        self.group = group
        self.limit = limit
        if group is not None and limit is not None:
            _limits[group] = limit
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.stage = "start"

    @classmethod
    def of(cls, group: dist.ProcessGroup | str | None) -> "World":
        """The processes of a group; of ``"world"`` all that ``torch.distributed`` has joined, or this one alone."""
        if isinstance(group, str):
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        return cls(group, _limits.get(group) if group is not None else None)

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
            with self._waiting():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """For the time of a backward pass, whose gradients :meth:`sum_gradients` sums."""
        try:
            yield
        finally:
            _watch.end()

    def sum_gradients(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The sum over the processes of a bucket of gradients: a hook of DistributedDataParallel, which then waits."""
        work = dist.all_reduce(bucket.buffer(), group=self.group, async_op=True)
        if bucket.is_last():  # this process has computed all of its gradients
            _watch.begin(self._awaited)
        return work.get_future().then(lambda future: future.value()[0])

    def largest(self, value: int) -> int:
        """The largest of the processes' values. Does not wait for a GPU."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        with self._waiting():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._waiting():
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
        with self._waiting():
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
        try:
            with self._waiting():
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

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        return _watch.waiting(self._awaited)

    def _awaited(self) -> str:
        end = "" if self.limit is None else f"; it gives up after {_in_words(self.limit)} (`peer_timeout`)"
        return (
            f"rank {self.rank} of {self.size} has waited {PATIENCE:.0f} seconds for another process, at "
            f"{self.stage}{end}"
        )


#: one process by itself
ALONE = World()


class Apart(World):
    """Processes that each do work of their own, for any time, and bring the results together; nothing else is sent.

    They need no group: results and signs of life go through the store where they met.
    """

    def __init__(self, meeting: "Meeting") -> None:
        super().__init__(None, meeting.limit)
        self.rank, self.size = meeting.rank, meeting.size
        self._meeting = meeting

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. Waits for any time for a process that is alive.

        Raises:
            DistributedError: if a process has ended without a value, or given no sign of life for the time limit.
        """
        self._meeting.publish("result", pickle.dumps(value))
        values = [pickle.loads(text) for text in self._meeting.collect("result", alive=True)]
        self._meeting.leave()
        return values


class Meeting:
    """The store through which processes find one another: served by ``torchrun``, or else by rank 0.

    Args:
        limit: for how long to wait for the others.

    Raises:
        DistributedError: if its address is invalid, or cannot be reached within the limit.
    """

    def __init__(self, limit: datetime.timedelta) -> None:
        self.rank, self.size, self.limit = rank(), _variable("WORLD_SIZE"), limit
        self._host, self._port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT")
        if not self._host:
            raise DistributedError("the environment variable MASTER_ADDR is not set; give the address of rank 0")
        if not 0 < self._port < 1 << 16:
            raise DistributedError(f"MASTER_PORT={self._port} is no port; give a number from 1 to {(1 << 16) - 1}")
        self._place = f"MASTER_ADDR={self._host}, MASTER_PORT={self._port}"
        self._trouble = "no answer"
        self._agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves it, not rank 0
        self._left = False
        self._quiet = threading.Event()
        self.store: dist.Store = self._within_limit(self._connect)

    # --- the store ----------------------------------------------------------------------------------------------

    def _connect(self) -> dist.Store:
        serves = self.rank == 0 and not self._agent
        until = time.monotonic() + self.limit.total_seconds()
        while True:
            try:
                if serves:
                    socket.getaddrinfo(self._host, self._port)
                else:
                    socket.create_connection((self._host, self._port), PATIENCE).close()
                break
            except OSError as error:
                self._trouble = reason(error)
            if time.monotonic() > until:
                raise DistributedError(self._unreachable())
            time.sleep(0.2)
        try:
            store = dist.TCPStore(
                # the server listens at every address, the name of which may lead here from elsewhere only
                "localhost" if serves else self._host,
                self._port,
                is_master=serves,
                timeout=self.limit,
                wait_for_workers=False,
                multi_tenant=True,
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )
        except RuntimeError as error:
            self._trouble = reason(error)
            raise DistributedError(self._unreachable()) from error
        # those of an attempt before torchrun started all anew are not asked
        return dist.PrefixStore(f"g2g/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _unreachable(self) -> str:
        return (
            f"cannot meet the other processes at {self._place} ({self._trouble}): give the address of rank 0's machine "
            "and a port that is free there and open to the others"
        )

    def _within_limit(self, question: Callable[[], ResultT], seconds: float | None = None) -> ResultT:
        """What ``question``, which may block inside PyTorch, returns within so many seconds, or within the limit."""
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put((question(), None))
            except BaseException as error:
                answer.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            with _watch.waiting(
                lambda: (
                    f"rank {self.rank} has waited {PATIENCE:.0f} seconds for an answer at {self._place} "
                    f"({self._trouble}); it gives up after {_in_words(self.limit)} (`peer_timeout`)"
                )
            ):
                result, error = answer.get(timeout=self.limit.total_seconds() + 1 if seconds is None else seconds)
        except queue.Empty:
            raise DistributedError(self._unreachable()) from None
        if isinstance(error, RuntimeError) and not isinstance(error, DistributedError):
            raise DistributedError(f"lost the connection to {self._place} (PyTorch says: {reason(error)})") from error
        if error is not None:
            raise error
        return result

    def publish(self, what: str, value: bytes, seconds: float | None = None) -> None:
        """Lets the others know this process's value."""
        key = f"{what}/{self.rank}"
        self._within_limit(lambda: self.store.set(key, value), seconds)  # type: ignore[arg-type]  # it takes bytes, too

    def _value(self, what: str, other: int, seconds: float | None = None) -> bytes | None:
        key = f"{what}/{other}"
        return self._within_limit(lambda: self.store.get(key) if self.store.check([key]) else None, seconds)

    def collect(self, what: str, alive: bool = False) -> list[bytes]:
        """The values that all have published, by rank.

        Args:
            alive: whether to wait for any time for processes that give signs of life (:meth:`live`).

        Raises:
            DistributedError: if one of them has ended, or is not heard of within the limit.
        """
        values: dict[int, bytes] = {}
        heard = dict.fromkeys(range(self.size), (time.monotonic(), b""))  # the last sign of each, and when it came
        said, pause = False, 0.005
        while True:
            for other in heard.keys() - values.keys():
                value = self._value(what, other)
                if value is not None:
                    values[other] = value
                    continue
                ended = self._value("ended", other)
                if ended is not None:
                    raise DistributedError(f"rank {other} has ended: {ended.decode()}")
                sign = self._value("pulse", other) if alive else None
                if sign is not None and sign != heard[other][1]:
                    heard[other] = time.monotonic(), sign
            missing = sorted(heard.keys() - values.keys())
            if not missing:
                return [values[other] for other in sorted(values)]
            silence = time.monotonic() - min(heard[other][0] for other in missing)
            if silence > PATIENCE and not said:
                said = True
                silent = [other for other in missing if time.monotonic() - heard[other][0] > PATIENCE]
                logger.warning(
                    "rank %d of %d has heard nothing from %s for %.0f seconds; it gives up after %s (`peer_timeout`)",
                    self.rank, self.size, _ranks(silent), PATIENCE, _in_words(self.limit),
                )  # fmt: skip
            if silence > self.limit.total_seconds():
                silent = [other for other in missing if time.monotonic() - heard[other][0] > silence - PULSE]
                raise DistributedError(
                    f"heard nothing from {_ranks(silent)} for {_in_words(self.limit)}: look what became of it, then "
                    "run the same command again; `peer_timeout` sets this limit"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)

    # --- what they say ------------------------------------------------------------------------------------------

    def agree(self, about: Mapping[str, Any]) -> None:
        """Raises DistributedError, in every process, unless all say the same about themselves; it names what differs.

        Only ``program`` is named if that differs.
        """
        self.publish("about", pickle.dumps({"number of processes": self.size, **about}))
        theirs = [pickle.loads(text) for text in self.collect("about")]
        names = list(dict.fromkeys(name for each in theirs for name in each))
        lines = []
        for name in names:
            ranks: dict[str, list[int]] = {}
            for number, each in enumerate(theirs):
                ranks.setdefault(str(each.get(name, "not set")), []).append(number)
            if len(ranks) > 1:
                lines.append(f"  {name}: {', '.join(f'{value} in {_ranks(of)}' for value, of in ranks.items())}")
                if name == "program":
                    break
        if lines:
            self.leave()
            differing = "\n".join(lines)
            raise DistributedError(
                f"the processes do not match:\n{differing}\n"
                "Start all with the same program, flags and versions (G2G_CPU_ISA sets the instruction set)."
            )

    def leave(self) -> None:
        """Leaves, when all know what this process knows.

        The process that serves the store has to be the last; with ``torchrun``, which ends all where one ends, each.
        """
        self._quiet.set()
        self._left = True
        with contextlib.suppress(DistributedError):
            self.publish("leaving", b"", FAREWELL)
            until = time.monotonic() + FAREWELL
            for other in range(self.size if self._agent or self.rank == 0 else 0):
                while self._value("leaving", other, FAREWELL) is None and time.monotonic() < until:
                    time.sleep(0.02)

    def _is_open(self) -> bool:
        """Whether the others can still be told and asked something: PyTorch's own attempt would print a traceback."""
        if self._left:
            return False
        try:
            socket.create_connection((self._host, self._port), FAREWELL).close()
        except OSError:
            return False
        return True

    def end(self, error: BaseException) -> None:
        """Lets the others know, if possible, why this process ends."""
        if self._is_open():
            with contextlib.suppress(DistributedError):
                self.publish("ended", (str(error) or type(error).__name__).encode(), FAREWELL)

    def endings(self) -> list[str]:
        """Why other processes have ended, as far as they said it."""
        said = []
        if self._is_open():
            with contextlib.suppress(DistributedError):
                for other in range(self.size):
                    text = self._value("ended", other, FAREWELL)
                    if text is not None and other != self.rank:
                        said.append(f"rank {other} has ended: {text.decode()}")
        return said

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """While entered, this process gives signs of life."""

        def beat() -> None:
            number = 0
            with contextlib.suppress(RuntimeError):  # the others are gone; this process will learn it by itself
                while not self._quiet.is_set():
                    self.store.set(f"pulse/{self.rank}", str(number))
                    number += 1
                    self._quiet.wait(PULSE)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._quiet.set()
            thread.join(PULSE)


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
def meet(peer_timeout: datetime.timedelta) -> Iterator[Meeting]:
    """Where the processes that ``torchrun`` started meet; one that fails while it is entered tells the others why."""
    meeting = Meeting(peer_timeout)
    try:
        yield meeting
    except LostConnectionError:  # the process that ended tells why
        raise
    except BaseException as error:
        meeting.end(error)
        raise


@contextlib.contextmanager
def apart(about: Mapping[str, Any], peer_timeout: datetime.timedelta = LIMIT) -> Iterator[World]:
    """The processes that ``torchrun`` started, while entered, to work apart (:class:`Apart`); ``ALONE`` without it.

    Args:
        about: what must be the same in all.
        peer_timeout: for how long to wait for a process that gives no sign of life.

    Raises:
        DistributedError: if they do not match, or one of them has ended.
    """
    if not launched():
        yield ALONE
        return
    with meet(peer_timeout) as meeting, meeting.live():
        meeting.agree(about)
        yield Apart(meeting)


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
    # optimizers import this module, whose functions take the group at the time of that import as their default
    importlib.import_module("torch.distributed.nn")
    with _leaving_group(), meet(peer_timeout) as meeting:
        _check_interfaces()
        meeting.agree(about or {})
        try:
            dist.init_process_group(
                BACKENDS[device.type],
                store=dist.PrefixStore("group", meeting.store),
                rank=meeting.rank,
                world_size=meeting.size,
                timeout=peer_timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                "the processes have met, but cannot connect to one another; GLOO_SOCKET_IFNAME names the network "
                f"interface to use. PyTorch says: {reason(error)}"
            ) from error
        try:
            yield World(dist.group.WORLD, peer_timeout)
        except RuntimeError as error:
            # gloo has no type of its own for them
            if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
                raise LostConnectionError(_lost(error, meeting)) from error
            raise


@contextlib.contextmanager
def _leaving_group() -> Iterator[None]:
    """Leaves PyTorch's group at the end, when the others already know why."""
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # gloo's threads end with the last reference to the group, which may be in a cycle. One that still runs while
        # the interpreter is torn down, and asks for its lock, aborts the process.
        atexit.register(gc.collect)


def _check_interfaces() -> None:
    """Raises DistributedError if gloo is to use a network interface that this machine does not have."""
    interfaces = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in interfaces:
            raise DistributedError(
                f"GLOO_SOCKET_IFNAME={name} is no network interface of this machine; it has {', '.join(interfaces)}"
            )


def _lost(error: RuntimeError, meeting: Meeting) -> str:
    """The message for a connection that ended, or on which nothing came for too long."""
    endings = meeting.endings()
    if endings:
        return "; ".join(endings)
    what = "lost the connection to another process"
    if "imed out" in str(error):
        what = f"another process has not answered for {_in_words(meeting.limit)} (`peer_timeout`)"
    return (
        f"{what}; run the same command again to resume from the last checkpoint, with any number of processes. "
        f"PyTorch says: {reason(error)}"
    )
