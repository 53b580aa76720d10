"""The ``main`` of every program: runs it on its flags, and turns errors into messages and an exit status."""

import argparse
import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from g2g_kernels import BackendError
from g2gnet.base.distributed import DistributedError, launched, rank
from g2gnet.base.memory import ran_out
from g2gnet.base.messages import OutputError, discard, reason, warn
from g2gnet.base.optional import MissingPackageError
from g2gnet.data import DataError
from g2gnet.network_settings import SettingsError
from g2gnet.programs.flags import Parser
from g2gnet.programs.output import STDOUT, check_json, write_json
from g2gnet.training import CheckpointError, Interrupted, TrainingError

#: exit status of a program whose reader has closed the pipe, as ``head`` does: 128 + SIGPIPE, which Windows lacks
READER_LEFT = 128 + 13
#: errors that are shown without a traceback: invalid requests, and failures while running
REFUSED = (SettingsError, BackendError, MissingPackageError)
FAILED = (DataError, CheckpointError, TrainingError, DistributedError, OutputError)
#: settings that increase the memory of a training step
GROWING = ("batch_size", "T", "hidden_dim")


def run_program(
    parser: Parser,
    program: Callable[[argparse.Namespace], dict[str, Any] | None],
    argv: Any,
    interrupted: str = "run the same command again to resume after the last finished epoch",
) -> int:
    """Runs ``program`` on the parsed flags; user errors become a message and an exit status.

    ``program`` returns what ``--json`` writes, if it has that flag; ``interrupted`` is printed after Ctrl-C. The status
    is 0 on success, 1 if data, files, memory or training failed, 2 for invalid flags, 128 + the number of the signal
    that ended it (130 after Ctrl-C, 141 when nobody reads its output).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (until the process ends)
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the code page of a pipe on Windows lacks the rules of our tables
    arguments = parser.parse_args(argv)
    tqdm.set_lock(threading.RLock())  # the usual lock is the system's: a process that is killed would leave it behind
    logging.basicConfig(handlers=[_Messages(parser)], format="%(message)s", level=logging.WARNING)
    json_file = getattr(arguments, "json", None)
    try:
        if rank() == 0:
            for name in ("g2g_kernels", "g2gnet.data"):
                logging.getLogger(name).setLevel(logging.INFO)
        check_json(arguments)
        # where the document goes to standard output, nothing else does
        apart = contextlib.redirect_stdout(sys.stderr) if json_file == STDOUT else contextlib.nullcontext()
        with apart, memory_named(arguments):
            document = program(arguments)
        if json_file and document is not None:
            write_json(json_file, document)
    except REFUSED as error:
        return _fail(parser, error, 2)
    except FAILED as error:
        return _fail(parser, error, 1)
    except Interrupted as interruption:
        if rank() == 0:
            warn(f"{parser.prog}: {interruption}")
        return 128 + interruption.signal
    except BrokenPipeError:
        discard(sys.stdout)
        return READER_LEFT
    except KeyboardInterrupt:
        warn(f"\n{parser.prog}: interrupted; {interrupted}")
        return 130
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            discard(sys.stderr)
    return 0


@contextlib.contextmanager
def memory_named(arguments: argparse.Namespace) -> Iterator[None]:
    """Turns a failed allocation into a TrainingError that names the flags of this program that save memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        flags = vars(arguments)
        fixed = "T" if flags.get("sequence") not in (None, "none") else ""  # sequences have their own length
        growing = {name: flags[name] for name in GROWING if name in flags and name != fixed}
        lower = [f"--{n}{f' (now {now})' if now else ''}" for n, now in growing.items() if isinstance(now, int | None)]
        remedies = [f"lower {' or '.join(lower)}"] if lower else []
        if "chunk" in flags and flags["chunk"] is None:
            remedies.append("give --chunk, so that a step keeps less for each of many time steps")
        if flags.get("precision") == "fp32":
            remedies.append("give --precision bf16, which halves what a step keeps")
        raise TrainingError("; ".join([f"out of memory: {reason(error)}", *remedies])) from error


def _fail(parser: Parser, error: Exception, status: int) -> int:
    try:
        speaker = f"{parser.prog}, rank {rank()}" if launched() else parser.prog
    except DistributedError:  # then the error to show says the same
        speaker = parser.prog
    warn(f"{speaker}: error: {parser.in_flags(str(error))}")
    return status


class _Messages(logging.StreamHandler):
    """Shows messages of loggers with the program's flags, on lines of their own beside a progress bar."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self._parser = parser

    def format(self, record: logging.LogRecord) -> str:
        return self._parser.in_flags(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
