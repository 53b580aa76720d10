"""Command-line flags made from :class:`TrainSettings`, shared by the programs at the top of the repository."""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import io
import json
import logging
import os
import platform
import re
import sys
import threading
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from g2g_kernels import BackendError, select_device
from g2g_kernels.dispatch import BACKENDS, require_backend
from g2g_kernels.numbers import COUNT, Number
from g2gnet.base.distributed import LIMIT, DistributedError, launched, rank
from g2gnet.base.files import check_writable, replace_file, same_file
from g2gnet.base.memory import ran_out
from g2gnet.base.messages import OutputError, discard, reason, say, warn
from g2gnet.base.tensor_files import has_digest
from g2gnet.base.version import __version__
from g2gnet.data import DATASETS, DataError, ImageData, MissingDataError, dataset_name, load_dataset, npz
from g2gnet.data.augmentation import SHIFTS
from g2gnet.data.features import load_features, weights_digest
from g2gnet.data.npz import SUFFIX as DATA_SUFFIX
from g2gnet.inspect import ANALYSIS_SAMPLES
from g2gnet.sequences import sequence_length
from g2gnet.settings import Default, DefaultName, SettingsError, number_of
from g2gnet.training import (
    CheckpointError,
    EpochCallback,
    Interrupted,
    Machine,
    RunSettings,
    Trainer,
    TrainingError,
    TrainSettings,
)
from g2gnet.training.checkpoints import RunFiles
from g2gnet.training.tensorboard import TensorBoardLog

logger = logging.getLogger("g2gnet")

#: of settings, in the order of the help
GROUPS = ("data", "model", "training", "dynamic sparse training", "cross-validation")
#: what stands for a flag's value in the help
METAVARS = {int: "N", float: "X", str: "FILE"}
#: in place of a file's name: standard output
STDOUT = "-"
#: exit status of a program whose reader has closed the pipe, as ``head`` does: 128 + SIGPIPE, absent on Windows
READER_LEFT = 128 + 13


def file_name(text: str) -> str:
    """The type of a flag that names a file or a directory.

    Raises:
        ArgumentTypeError: for an empty name, as of a shell's unset variable: it would be the current directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give one (the current directory is .)")
    return text


def as_it_is(text: str) -> str:
    """The type of a flag with choices; ``str`` would make another string of a :class:`DefaultName`."""
    return text


class _Plain(argparse.HelpFormatter):
    """Shows a flag's text as it is, where argparse takes a per cent sign for the begin of a format."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return text and text.replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations; an error is one line, with the flag that may have been meant.

    Everything below the programs names settings and arguments, in backticks where it says what to give;
    :meth:`in_flags` makes this program's flags of them.
    """

    def __init__(self, formatter_class: Any = argparse.HelpFormatter, **options: Any) -> None:
        plain: Any = type("Plain", (_Plain, formatter_class), {})
        super().__init__(allow_abbrev=False, formatter_class=plain, **options)
        # what begins with - and is a value; argparse's own takes -1e-3 for a flag
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-(inf|infinity|nan)$", re.I)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            self.error(f"unknown flag {flags[0]}{self._suggestion(flags[0])}")
        if unknown:
            self.error(f"unknown arguments {' '.join(unknown)}; --help lists what this program takes")
        return arguments

    def error(self, message: str) -> typing.NoReturn:
        """Ends the program with one line: what is wrong and what to do; argparse prints all flags before it."""
        kinds = {"int": "a whole number", "float": "a number"}
        bad = re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message)
        text = f"{bad[1]} {bad[3]} is not {kinds[bad[2]]}" if bad else message
        known = ("--help", "did you mean", "choose from", "; give ")  # says what to do
        remedy = "" if any(word in text for word in known) else "; --help says what it takes"
        self.exit(2, f"{self.prog}: error: {text}{remedy}\n")

    def format_help(self) -> str:
        """The help, whose first line does not repeat its flags."""
        named = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s [flags]", *named])
        return super().format_help()

    def in_flags(self, text: str) -> str:
        """``text`` with what is in backticks as flags: ```neuron=synaptic``` as ``--neuron synaptic``."""

        def flag(found: re.Match[str]) -> str:
            name, value = f"--{found[1]}", found[2]
            if name not in self._option_string_actions:
                return found[0]
            return name if value is None else f"{name} {value}"

        return re.sub(r"`(\w+)(?:=([^`]*))?`", flag, text)

    def _suggestion(self, flag: str) -> str:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        name = "--" + flag.lstrip("-").replace("-", "_")
        near = [each for each in known if each.lower() == name.lower()]
        near = near or [each for each in known if len(name) > 2 and each.startswith(name)]
        near = near or [f"--{each}" for each in difflib.get_close_matches(name[2:], [flag[2:] for flag in known], 1)]
        return f"; did you mean {' or '.join(near)}?" if near else "; --help lists the flags"


def flag_types(settings: type) -> dict[str, Any]:
    """The type of a value of each field: of ``int | None`` it is int."""
    hints = typing.get_type_hints(settings)
    return {
        name: typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind for name, kind in hints.items()
    }


def add_settings_flags(parser: Parser, settings: type = TrainSettings, names: Collection[str] | None = None) -> None:
    """Adds one flag for each field of ``settings`` that has a group, in these groups; with ``names`` only for these."""
    types_of = flag_types(settings)
    fields = [field for field in dataclasses.fields(settings) if names is None or field.name in names]
    present = {field.metadata["group"] for field in fields}
    groups = {title: parser.add_argument_group(title) for title in GROUPS if title in present}
    for field in fields:
        about, flag_type = field.metadata, types_of[field.name]
        if about["group"] is None:
            continue
        group = groups[about["group"]]
        text = parser.in_flags(about["text"])
        if flag_type is bool:
            group.add_argument(f"--{field.name}", action="store_true", help=text)
            continue
        if about["others"]:
            text += f": {', '.join(about['choices'])}, or {about['others'].text} of your own"
        number = number_of(about, flag_type)
        if number and number.range:
            text += f"; {number.range}"
        if field.default is not None:
            text += f" (default: {field.default})"
        group.add_argument(
            f"--{field.name}",
            type=flag_type if flag_type is not str else as_it_is if about["choices"] else file_name,
            default=field.default,
            choices=None if about["others"] else about["choices"],
            metavar=about["metavar"]
            or ("NAME" if about["others"] else None if about["choices"] else METAVARS[flag_type]),
            help=text,
        )


def add_machine_flags(parser: argparse.ArgumentParser, kernels: bool = True, results: bool = True) -> Any:
    """Adds the flags that say where to compute (``kernels``: and with which kernels) and where files lie.

    They do not change what is computed. ``results``: the program writes checkpoints. Returns their group.
    """
    group = parser.add_argument_group("machine and files")
    text = "directory of the data sets (default: data)"
    group.add_argument("--data_dir", type=file_name, default="data", metavar="DIR", help=text)
    if results:
        text = "directory for results (default: checkpoints)"
        group.add_argument("--checkpoint_dir", type=file_name, default="checkpoints", metavar="DIR", help=text)
    text = "auto (DirectML, then CUDA, then CPU), cpu, cuda, cuda:N, directml, mps, xpu or xpu:N"
    group.add_argument("--device", default="auto", help=text)
    if kernels:
        text = "kernels to use (default: the device decides)"
        group.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help=text)
    return group


def add_peer_flag(group: Any) -> None:
    """Adds the flag for the time that processes wait for one another."""
    text = "minutes that processes started by torchrun wait for one another (default: 30)"
    group.add_argument("--peer_timeout", type=float, default=LIMIT.total_seconds() / 60, metavar="MINUTES", help=text)


def peer_limit(arguments: argparse.Namespace) -> datetime.timedelta:
    """The time that processes wait for one another.

    Raises:
        FlagError: if it is less than some moments, or more than a year.
    """
    wanted = Number(0.01, 365 * 24 * 60).refuses(arguments.peer_timeout)
    if wanted:
        raise FlagError(f"peer_timeout={arguments.peer_timeout} is out of range; give {wanted}")
    return datetime.timedelta(minutes=arguments.peer_timeout)


def about(program: str, settings: RunSettings, machine: Machine) -> dict[str, Any]:
    """What must be the same in all processes of a run."""
    versions = {"program": program, "python": platform.python_version(), **machine.versions()}
    if machine.device.type == "cpu":
        versions["PyTorch's instruction set"] = torch.backends.cpu.get_cpu_capability()
    return {**versions, **settings.as_dict()}


def add_graph_flags(group: Any) -> None:
    """Adds the flags for training steps as CUDA graphs."""
    text = "replay each training step as a CUDA graph (default: on a CUDA device, in one process); not run on a GPU yet"
    group.add_argument("--cuda_graph", action="store_true", default=None, help=text)
    text = "launch each kernel of a training step by itself"
    group.add_argument("--no_cuda_graph", action="store_false", dest="cuda_graph", default=None, help=text)


def add_log_flag(group: Any) -> None:
    """Adds the flag for TensorBoard's files."""
    text = "write scalars, histograms and heat maps for TensorBoard to DIR (default: none)"
    group.add_argument("--log_dir", type=file_name, metavar="DIR", help=text)


def log_from(arguments: argparse.Namespace) -> list[EpochCallback[Trainer]]:
    """The callbacks after each epoch, according to the flags.

    Raises:
        FlagError: if TensorBoard's package is missing, or the directory cannot be made.
    """
    if arguments.log_dir is None:
        return []
    try:
        return [TensorBoardLog(arguments.log_dir)]
    except (ImportError, OSError) as error:
        raise FlagError(f"log_dir={arguments.log_dir}: {reason(error)}") from error


def add_json_flag(parser: Any, content: str) -> None:
    """Adds the flag that writes ``content``, what a program returns, as JSON."""
    text = (
        f"write {content} as JSON to FILE, the word after this flag; without FILE to standard output, and all other "
        "output to standard error"
    )
    parser.add_argument("--json", type=file_name, nargs="?", const=STDOUT, metavar="FILE", help=text)


SettingsT = typing.TypeVar("SettingsT", bound=RunSettings)


def settings_from(arguments: argparse.Namespace, settings_type: type[SettingsT]) -> SettingsT:
    """The settings that the flags gave, with the content of a file of weights or of data in place of its name.

    Raises:
        SettingsError: if they are out of range or in conflict.
        DataError: if the file cannot be read.
    """
    fields = dataclasses.fields(settings_type)
    given = {field.name: getattr(arguments, field.name) for field in fields if field.metadata["group"]}
    given["dataset"] = dataset_name(given["dataset"])
    if issubclass(settings_type, TrainSettings) and npz.is_name(given["dataset"]):
        shape = npz.sample_shape(given["dataset"], Path(arguments.data_dir))
        # only images can be mirrored or lose a rectangle, which states what they are; frames are images in any case
        changed = len(shape) == 2 and (given["augment"] in SHIFTS or given["erase"] > 0)
        if npz.holds_sequences(shape) and isinstance(given["sequence"], DefaultName):
            if not changed:
                given["sequence"] = "own"
            else:
                logger.warning(
                    "the samples of %s, of shape %s, are read as images, as augment=%s and erase=%s say; without these "
                    "they are sequences. Give sequence=none to say so in either case",
                    given["dataset"], " × ".join(map(str, shape)), given["augment"], given["erase"],
                )  # fmt: skip
    settings = settings_type(**given)
    if isinstance(settings, TrainSettings) and settings.sequence != "none":
        known = DATASETS.get(settings.dataset)
        settings = dataclasses.replace(settings, T=_length(settings, known.shape if known else shape, arguments))
    if isinstance(settings, TrainSettings) and settings.use_resnet:
        digest = weights_digest(settings.dataset, settings.resnet_weights)
        settings = dataclasses.replace(settings, resnet_weights=digest)
    return settings


def _length(settings: TrainSettings, shape: tuple[int, ...], arguments: argparse.Namespace) -> int:
    """The time steps of samples of that shape, which are sequences.

    Raises:
        SettingsError: if they have no such steps, or their number is given.
    """
    try:
        steps = sequence_length(settings.sequence, shape, settings.sequence_step)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if not isinstance(arguments.T, Default):
        held = ""
        if isinstance(arguments.sequence, DefaultName):
            held = f", or give `sequence=none` if they are images of {' × '.join(map(str, shape))}, held for `T` steps"
        raise SettingsError(
            f"T={arguments.T} cannot be chosen: with sequence={settings.sequence} the samples of {settings.dataset} "
            f"have {steps} steps; leave `T` out{held}"
        )
    return steps


def load_data(arguments: argparse.Namespace, settings: TrainSettings, device: torch.device) -> ImageData:
    """The images or features that the flags ask for.

    Raises:
        DataError: if they are unavailable.
    """
    if settings.use_resnet:
        return load_features(settings.dataset, arguments.data_dir, arguments.resnet_weights, device)
    try:
        return load_dataset(settings.dataset, arguments.data_dir)
    except MissingDataError as error:
        if "dataset" not in arguments:  # it is that of a checkpoint
            raise
        raise MissingDataError(f"{error}\n--dataset fashionmnist-mini needs no files at all.") from error


def announce(settings: TrainSettings, machine: Machine) -> None:
    """Prints what is trained and the settings that differ from the defaults; warns of settings without effect."""
    for line in settings.without_effect():
        logger.warning("%s", line)
    if settings.enforce_sparsity and settings.warmup_epochs >= settings.epochs:
        warn(
            f"warning: --enforce_sparsity never begins: warmup_epochs={settings.warmup_epochs} is not below "
            f"epochs={settings.epochs}"
        )
    default = {**type(settings)(neuron=settings.neuron).given(), "neuron": type(settings).neuron}
    always = ("dataset", "model", "epochs", "seed")
    shown = " ".join(
        f"{name}={value}" for name, value in settings.given().items() if name in always or value != default[name]
    )
    where = f"device={machine.device} backend={machine.backend or 'auto'}"
    if machine.world.size > 1:
        where += f" processes={machine.world.size}"
    say(f"g2g {__version__} | {where} | {shown}")


def add_inspection_flags(parser: argparse.ArgumentParser) -> Any:
    """Adds the flags of the programs that run a trained network on test images; returns the last group of them."""
    parser.add_argument(
        "--samples",
        type=int,
        default=ANALYSIS_SAMPLES,
        metavar="N",
        help=f"run the network on the first N test images (default: {ANALYSIS_SAMPLES})",
    )
    text = "weights used by a run with --use_resnet, if not the published ones"
    parser.add_argument("--resnet_weights", type=file_name, metavar="FILE", help=text)
    return add_machine_flags(parser, results=False)


def load_run_data(arguments: argparse.Namespace, settings: TrainSettings, device: torch.device) -> ImageData:
    """The images or features of a run that was made with ``settings``, as far as it used them, on ``device``.

    Raises:
        FlagError: if ``--samples`` is not at least 1, or ``--resnet_weights`` are not those of the run.
        DataError: if they are unavailable.
    """
    wanted = COUNT.refuses(arguments.samples)
    if wanted:
        raise FlagError(f"samples={arguments.samples} is out of range; give {wanted}")
    if settings.use_resnet:
        given = weights_digest(settings.dataset, arguments.resnet_weights)
        if given != settings.resnet_weights:
            raise FlagError(
                f"the run had the ResNet weights {settings.resnet_weights}, these are {given}; give the file with the "
                "run's weights by --resnet_weights"
            )
    return load_data(arguments, settings, device).limited(settings.limit_train, settings.limit_test).to(device)


@contextlib.contextmanager
def standard_output(json_file: str | None) -> Iterator[None]:
    """While entered, output goes to standard error if ``--json`` needs standard output for itself."""
    with contextlib.redirect_stdout(sys.stderr) if json_file == STDOUT else contextlib.nullcontext():
        yield


def write_json(json_file: str, document: dict[str, Any]) -> None:
    """Writes one JSON document, with the version of g2g, to the target of ``--json``.

    Raises:
        OutputError: if the file cannot be written.
    """
    document = {"g2g": __version__, **document}
    text = json.dumps(document, indent=2, ensure_ascii=json_file == STDOUT) + "\n"
    if json_file == STDOUT:
        say(text.removesuffix("\n"))
    else:
        write_output(json_file, text)


class _BesideBars(logging.StreamHandler):
    """Messages of loggers on lines of their own, where a progress bar is on the terminal too."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _InFlags(logging.Formatter):
    """The messages of loggers in a program's flags."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self._parser = parser

    def format(self, record: logging.LogRecord) -> str:
        return self._parser.in_flags(super().format(record))


def run_program(
    parser: Parser,
    program: Callable[[argparse.Namespace], dict[str, Any] | None],
    argv: Any,
    interrupted: str = "run the same command again to resume after the last finished epoch",
) -> int:
    """Runs ``program`` on the parsed flags; user errors become a message and an exit status.

    Args:
        parser: the program's flags.
        program: takes the parsed flags; returns what ``--json`` writes, where there is that flag.
        argv: the flags as given.
        interrupted: what to say after Ctrl-C.

    Returns:
        0 on success, 1 if data, files, memory or training failed, 2 for invalid flags, 128 + the number of the signal
        that ended it (130 after Ctrl-C, 141 when nobody reads its output).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (until the process ends)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe on Windows has a code page without the lines of our tables
    arguments = parser.parse_args(argv)
    tqdm.set_lock(threading.RLock())  # the usual one is the system's, and left behind by a process that is killed
    handler = _BesideBars()
    handler.setFormatter(_InFlags(parser))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    json_file = getattr(arguments, "json", None)
    try:
        if rank() == 0:
            logging.getLogger("g2g_kernels").setLevel(logging.INFO)
        check_json(arguments)
        with standard_output(json_file), memory_named(arguments):
            document = program(arguments)
        if json_file and document is not None:
            write_json(json_file, document)
    except (SettingsError, BackendError, FlagError) as error:
        return _fail(parser, error, 2)
    except (DataError, CheckpointError, TrainingError, DistributedError, OutputError) as error:
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


#: settings with which the memory of a training step grows
GROWING = ("batch_size", "T", "hidden_dim")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@contextlib.contextmanager
def memory_named(arguments: argparse.Namespace) -> Iterator[None]:
    """Raises TrainingError, which names the flags that save memory, where an allocation fails inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise TrainingError(out_of_memory(error, arguments)) from error


def out_of_memory(error: BaseException, arguments: argparse.Namespace) -> str:
    """What was missing, of PyTorch's message, and the flags of this program that save memory."""
    size = r"([\d.]+) (bytes|[KMGT]iB)"
    pattern = rf"Tried to allocate {size}.*?total capacity of {size} of which {size} is free"
    found = re.search(pattern, str(error), re.DOTALL)
    what = f"out of memory: {reason(error)}"
    if found:
        wanted, total, free = (float(found[i]) * _UNITS[found[i + 1]] / 2**30 for i in (1, 3, 5))
        what = (
            f"the GPU's memory is full: {wanted:.2f} GiB more were needed and {free:.2f} of {total:.2f} GiB free, so "
            f"{max(0.0, wanted - free):.2f} GiB were missing"
        )
    flags = vars(arguments)
    fixed = "T" if flags.get("sequence", "none") != "none" else ""  # the samples have as many steps as they have
    growing = [name for name in GROWING if isinstance(flags.get(name), int) and name != fixed]
    lower = [f"--{name} (now {flags[name]})" for name in growing]
    remedies = [f"lower {' or '.join(lower)}"] if lower else []
    if "chunk" in flags and flags["chunk"] is None:
        remedies.append("give --chunk, so that a step keeps less for each of many time steps")
    if flags.get("precision") == "fp32":
        remedies.append("give --precision bf16, which halves what a step keeps")
    if "cuda_graph" in flags and flags["cuda_graph"] is not False:
        remedies.append("give --no_cuda_graph, since a graph keeps its memory between steps")
    return "; ".join([what, *remedies])


def _fail(parser: Parser, error: Exception, status: int) -> int:
    try:
        speaker = f"{parser.prog}, rank {rank()}" if launched() else parser.prog
    except DistributedError:  # which is what this error says
        speaker = parser.prog
    warn(f"{speaker}: error: {parser.in_flags(str(error))}")
    return status


#: endings of files that no program replaces by its output: checkpoints and data
KEPT = (".pth", DATA_SUFFIX)


def check_output(path: Path | str, arguments: argparse.Namespace | None = None, own: Iterable[Path] = ()) -> None:
    """Checks a file that is to be written, before there is anything to write.

    Args:
        path: the file.
        arguments: the parsed flags; neither the files that they have the program read nor those of the runs whose
            checkpoints these are become its output.
        own: other files that the program itself reads or writes.

    Raises:
        OutputError: if it cannot be written, is one of these, or holds a checkpoint or data.
    """
    path = Path(path)
    try:
        check_writable(path)
        lost = _what_is_lost(path, arguments, own)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({reason(error)}); give another file") from error
    if lost:
        raise OutputError(
            f"will not replace {path}: it is {lost}. Give another file; the one to write is the word that follows "
            "--json or --output"
        )


def _what_is_lost(path: Path, arguments: argparse.Namespace | None, own: Iterable[Path]) -> str | None:
    """What the file at ``path`` is, in words, if output must not replace it."""
    flags = {} if arguments is None else vars(arguments)
    checkpoints = [name for name in (flags.get("checkpoint"), *flags.get("checkpoints", ())) if name]
    inputs = [*checkpoints, *filter(None, [flags.get("resnet_weights")])]
    if str(flags.get("dataset")).endswith(DATA_SUFFIX):
        inputs.append(flags["dataset"])
    if any(same_file(path, Path(name)) for name in inputs):
        return "a file that this program reads"
    runs = (RunFiles.of(Path(name)) for name in checkpoints)
    if any(same_file(path, file) for file in [*own, *(file for run in runs for file in run.files())]):
        return "one of the run's own files"
    target = path.resolve()
    if target.is_file() and (target.suffix.lower() in KEPT or has_digest(target)):
        return "a checkpoint or a file of data"
    return None


def check_json(arguments: argparse.Namespace, own: Iterable[Path] = ()) -> None:
    """Checks the target of ``--json``, where there is one, as :func:`check_output` does."""
    json_file = getattr(arguments, "json", None)
    if json_file not in (None, STDOUT):
        check_output(json_file, arguments, own)


def write_file(path: Path | str, write: Callable[[BinaryIO], Any]) -> None:
    """Calls ``write`` to write a file completely or not at all (:func:`g2gnet.base.files.replace_file`).

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        replace_file(Path(path), write)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({reason(error)}); give another file, or free some space") from error


def write_output(path: Path | str, text: str) -> None:
    """Writes ``text`` to a file as UTF-8; bytes of file names that are not characters become escapes.

    Raises:
        OutputError: if it cannot be written.
    """
    write_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


class FlagError(ValueError):
    """A flag that is invalid on this machine."""


def machine_from(arguments: argparse.Namespace) -> Machine:
    """The device and the backend that the flags ask for; the process works alone until it joins others.

    Raises:
        FlagError: for a device that this machine does not have.
        BackendError: for a backend that cannot be used here.
    """
    backend = getattr(arguments, "backend", "auto")
    backend = None if backend == "auto" else backend
    try:
        require_backend(backend)
        device = select_device(arguments.device)
        if launched() and device.type == "cuda":
            if device.index is not None:
                raise FlagError(f"device={device} would serve all processes; give cuda, so that each takes its own")
            device = select_device(f"cuda:{rank('LOCAL_RANK')}")
    except ValueError as error:
        raise FlagError(str(error)) from error
    if device.type not in ("cpu", "cuda") and getattr(arguments, "precision", "fp32") == "bf16":
        raise FlagError(f"precision=bf16 needs a CPU or CUDA device, not {arguments.device}; give --precision fp32")
    cuda_graph = getattr(arguments, "cuda_graph", None)
    if cuda_graph and device.type != "cuda":
        raise FlagError(f"--cuda_graph needs a CUDA device, not {device}; leave it out, or give --device cuda")
    return Machine(device, backend, cuda_graph=cuda_graph)
