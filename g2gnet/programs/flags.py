"""Command-line flags, which all programs share: how they are parsed, and the settings, machine and data they give."""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import itertools
import logging
import platform
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from g2g_kernels import select_device
from g2g_kernels.choices import unknown
from g2g_kernels.dispatch import BACKENDS, require_backend
from g2g_kernels.numbers import COUNT, Number
from g2gnet.base.distributed import LIMIT, join, launched, rank
from g2gnet.base.messages import quoted, reason, say, warn
from g2gnet.base.version import __version__
from g2gnet.data import DATASETS, ImageData, MissingDataError, dataset_name, load_dataset, npz
from g2gnet.data.augmentation import SHIFTS
from g2gnet.data.features import load_features, weights_digest
from g2gnet.inspect import ANALYSIS_SAMPLES
from g2gnet.network_settings import SettingsError, number_of, types_of
from g2gnet.programs.output import STDOUT
from g2gnet.sequences import sequence_length
from g2gnet.training import EpochCallback, Machine, RunSettings, Trainer, TrainSettings
from g2gnet.training.run_settings import BINNED
from g2gnet.training.tensorboard import TensorBoardLog

logger = logging.getLogger("g2gnet")
SettingsT = typing.TypeVar("SettingsT", bound=RunSettings)

#: groups of settings, in the order of the help
GROUPS = ("data", "model", "training", "dynamic sparse training", "cross-validation")
#: what stands for a flag's value in the help; LIST for a number or a list of numbers
METAVARS = {int: "N", float: "X", str: "FILE"}
LIST = "N[,N…]"


class FlagError(SettingsError):
    """A flag that is invalid on this machine."""


def file_name(text: str) -> str:
    """The type of a flag that names a file or a directory. Refuses an empty name, as an unset variable gives."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give one, or leave the flag out")
    return text


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Shows text verbatim; argparse would read a percent sign as a format specifier."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return text and text.replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line and suggest a flag. Modules below the programs name
    settings and arguments, in backticks in their remedies; :meth:`in_flags` turns them into this program's flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False, "formatter_class": _Plain})
        # values that begin with -; argparse's own expression takes -1e-3 for a flag
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-(inf|infinity|nan)$", re.I)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            self.error(f"unknown flag {flags[0]}{self._suggestion(flags[0])}")
        words = list(sys.argv[1:] if args is None else args)
        for place, flag in enumerate(words if unknown else ()):
            given = list(itertools.takewhile(lambda word: not word.startswith("-"), words[place + 1 :]))
            action = self._option_string_actions.get(flag)
            if action is not None and action.type in (number_list, whole_numbers) and len(given) > 1:
                self.error(f"{flag} {' '.join(given)} is not one list; give {flag} {','.join(given)}")
        if unknown:
            self.error(f"unknown arguments {' '.join(unknown)}; --help lists what this program takes")
        return arguments

    def error(self, message: str) -> typing.NoReturn:
        """Ends the program with one line, what is wrong and what to do; argparse would list all flags before it."""
        kinds = {"int": "a whole number", "float": "a number"}
        bad = re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message)
        text = f"{bad[1]} {bad[3]} is not {kinds[bad[2]]}" if bad else message
        known = ("--help", "did you mean", "choose one of", "choose from", "; give ")  # which say what to do
        remedy = "" if any(word in text for word in known) else "; see --help"
        self.exit(2, f"{self.prog}: error: {text}{remedy}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Argparse's check of a choice, with the message of the library."""
        if action.choices is not None and value not in action.choices:
            self.error(unknown("/".join(action.option_strings) or action.dest, value, map(str, action.choices)))

    def format_help(self) -> str:
        """The help, with a first line that does not list the flags."""
        named = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s [flags]", *named])
        return super().format_help()

    def in_flags(self, text: str) -> str:
        """``text`` with flags for the settings in backticks: ``--neuron synaptic`` for ```neuron=synaptic```."""

        def flag(found: re.Match[str]) -> str:
            name, value = f"--{found[1]}", found[2]
            if name not in self._option_string_actions:
                return found[0]
            return name if value is None else f"{name} {value}"

        return re.sub(r"`(\w+)(?:=([^`]*))?`", flag, text)

    def _suggestion(self, flag: str) -> str:
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        name = flag.lstrip("-").replace("-", "_")
        near = (
            [each for each in known if each.lower() == name.lower()]
            or [each for each in known if name and each.startswith(name)]
            or difflib.get_close_matches(name, known, 1)
        )
        return f"; did you mean {' or '.join(f'--{each}' for each in near)}?" if near else "; --help lists the flags"


def number_list(text: str) -> tuple[int, ...]:
    """The type of a flag that takes whole numbers, separated by commas."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one, or a list as 64,48") from None


def whole_numbers(text: str) -> int | tuple[int, ...]:
    """The type of a flag that takes a whole number, or a list of them."""
    values = number_list(text)
    return values if len(values) > 1 else values[0]


def add_settings_flags(parser: Parser, settings: type = TrainSettings, sweep: bool = False) -> None:
    """Adds a flag for each field of ``settings`` that has a group. For a sweep, each flag takes one word or several."""
    kinds_of = types_of(settings)
    fields = [field for field in dataclasses.fields(settings) if field.metadata["group"]]
    present = {field.metadata["group"] for field in fields}
    groups = {title: parser.add_argument_group(title) for title in GROUPS if title in present}
    for field in fields:
        about, (flag_type, *_) = field.metadata, kinds_of[field.name]
        text, number = parser.in_flags(about["text"]), number_of(about, kinds_of[field.name])
        options: dict[str, Any] = {"type": flag_type, "default": field.default}
        options["metavar"] = about["metavar"] or METAVARS.get(flag_type)
        if about["several"]:
            options |= {"type": number_list if flag_type is bool else whole_numbers, "metavar": LIST}
            options |= {"nargs": "?", "const": True} if flag_type is bool else {}
        elif flag_type is bool:
            options = {"action": "store_true"}
        elif about["others"]:
            text += f": {', '.join(about['choices'])}, or {about['others'].text} of your own"
            options["metavar"] = "NAME"
        elif about["choices"]:
            options |= {"choices": about["choices"], "metavar": None}
        elif flag_type is str:
            options["type"] = file_name
        elif number and number.range:
            text += f"; {number.range}"
        if field.default is not None and field.default is not False:
            text += f" (default: {field.default})"
        if sweep:  # a switch without a word turns it on
            metavar = options.get("metavar") or ("true|false" if flag_type is bool else "NAME")
            options = {"nargs": "*" if flag_type is bool else "+", "default": field.default, "metavar": metavar}
        groups[about["group"]].add_argument(f"--{field.name}", help=text, **options)


def add_machine_flags(parser: argparse.ArgumentParser, kernels: bool = True, results: bool = True) -> Any:
    """Adds the flags of device, files, (``kernels``) backend and (``results``) checkpoints. Returns their group."""
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


def add_json_flag(parser: Any, content: str) -> None:
    """Adds the flag that writes ``content``, which the program returns, as JSON."""
    text = (
        f"write {content} as JSON to FILE, the next argument; without FILE to standard output, and all other output to "
        "standard error"
    )
    parser.add_argument("--json", type=file_name, nargs="?", const=STDOUT, metavar="FILE", help=text)


def add_inspection_flags(parser: argparse.ArgumentParser) -> Any:
    """Adds the flags of the programs that run a trained network on test images; returns the last group of them."""
    text = f"run the network on the first N test images (default: {ANALYSIS_SAMPLES})"
    parser.add_argument("--samples", type=int, default=ANALYSIS_SAMPLES, metavar="N", help=text)
    text = "weights used by a run with --use_resnet, if not the published ones"
    parser.add_argument("--resnet_weights", type=file_name, metavar="FILE", help=text)
    return add_machine_flags(parser, results=False)


def settings_from(arguments: argparse.Namespace, settings_type: type[SettingsT]) -> SettingsT:
    """The settings that the flags gave; the content of a file of weights or data takes the place of its name. Raises
    SettingsError if they are out of range or in conflict, and DataError if the file cannot be read."""
    values = {name: getattr(arguments, name) for name in settings_type().flag_values()}
    values["dataset"] = dataset_name(values["dataset"])
    if not issubclass(settings_type, TrainSettings):
        return settings_type(**values)
    if npz.is_name(values["dataset"]):
        shape = npz.sample_shape(values["dataset"], Path(arguments.data_dir))
        if npz.holds_sequences(shape) and values["sequence"] is None:
            if len(shape) == 2 and (values["augment"] in SHIFTS or values["erase"] > 0):
                raise SettingsError(
                    f"augment={values['augment']} and erase={values['erase']} are of images, but samples of shape "
                    f"{' × '.join(map(str, shape))} are sequences; give `sequence=none` if they are images"
                )
            values["sequence"] = "own"
    # first without the setting that is compared with T, which the samples may decide
    settings, found = settings_type(**values | {"input_taps": 1}), {"input_taps": values["input_taps"]}
    if settings.sequence != "none" and settings.dataset not in BINNED:  # of recordings T is chosen
        known = DATASETS.get(settings.dataset)
        found["T"] = _length(settings, known.shape if known else shape, arguments)
    if settings.use_resnet:
        found["resnet_weights"] = weights_digest(settings.dataset, settings.resnet_weights)
    return dataclasses.replace(settings, **found)


def _length(settings: TrainSettings, shape: tuple[int, ...], arguments: argparse.Namespace) -> int:
    """The time steps of samples of that shape. Raises SettingsError if they are no sequences, or ``T`` is given."""
    try:
        steps = sequence_length(settings.sequence, shape, settings.sequence_step)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if arguments.T is not None:
        held = ""
        if arguments.sequence is None:
            held = f", or give `sequence=none` if they are images of {' × '.join(map(str, shape))}, held for `T` steps"
        samples = f"with sequence={settings.sequence} the samples of {settings.dataset} have {steps} steps"
        raise SettingsError(f"T={arguments.T} cannot be chosen: {samples}; leave `T` out{held}")
    return steps


def machine_from(arguments: argparse.Namespace) -> Machine:
    """The device and the backend of the flags, for a process by itself. Raises FlagError for a device that this machine
    does not have, and BackendError for a backend that cannot be used here."""
    given = getattr(arguments, "backend", "auto")
    backend = None if given == "auto" else given
    try:
        require_backend(backend)
        device = select_device(arguments.device)
        if launched() and device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"device={device} would serve all processes; give cuda, so that each takes its own")
            device = select_device(f"cuda:{rank('LOCAL_RANK')}")
    except ValueError as error:
        raise FlagError(str(error)) from error
    if device.type not in ("cpu", "cuda") and getattr(arguments, "precision", "fp32") == "bf16":
        raise FlagError(f"precision=bf16 needs a CPU or CUDA device, not {arguments.device}; give --precision fp32")
    return Machine(device, backend)


def training_parser(description: str, examples: str, settings: type[TrainSettings], document: str) -> Parser:
    """The parser of a program that trains networks with ``settings`` and writes ``document`` as JSON."""
    parser = Parser(description=description, epilog=examples)
    add_settings_flags(parser, settings)
    group = add_machine_flags(parser)
    text = "minutes that processes started by torchrun wait for one another (default: 30)"
    group.add_argument("--peer_timeout", type=float, default=LIMIT.total_seconds() / 60, metavar="MINUTES", help=text)
    text = "write scalars, histograms and heat maps for TensorBoard to DIR (default: none)"
    group.add_argument("--log_dir", type=file_name, metavar="DIR", help=text)
    add_json_flag(group, document)
    parser.add_argument("--version", action="version", version=f"g2g {__version__}")
    return parser


@contextlib.contextmanager
def joined(
    arguments: argparse.Namespace, program: str, settings: TrainSettings, machine: Machine, device: torch.device
) -> Iterator[Machine]:
    """``machine`` with the processes of a run (:func:`g2gnet.base.distributed.join`), which must have the same settings
    and versions; the first prints what is trained. Raises FlagError for a ``peer_timeout`` out of range."""
    if wanted := Number(0.01, 365 * 24 * 60).refuses(arguments.peer_timeout):
        raise FlagError(f"peer_timeout={arguments.peer_timeout} must be {wanted}")
    same = {"program": program, "python": platform.python_version(), **machine.versions()}
    if machine.device.type == "cpu":
        same["PyTorch's instruction set"] = torch.backends.cpu.get_cpu_capability()
    with join(device, {**same, **settings.as_dict()}, datetime.timedelta(minutes=arguments.peer_timeout)) as world:
        machine = machine._replace(world=world)
        if world.leads:
            announce(settings, machine)
        yield machine


def log_from(arguments: argparse.Namespace) -> list[EpochCallback[Trainer]]:
    """The callbacks of ``--log_dir``. Raises FlagError if there can be no such directory, and MissingPackageError."""
    if arguments.log_dir is None:
        return []
    try:
        return [TensorBoardLog(arguments.log_dir)]
    except OSError as error:
        raise FlagError(f"log_dir={arguments.log_dir}: {reason(error)}") from error


def load_data(arguments: argparse.Namespace, settings: TrainSettings, device: torch.device) -> ImageData:
    """The images or features of the flags. Raises DataError if they are unavailable."""
    if settings.use_resnet:
        return load_features(settings.dataset, arguments.data_dir, arguments.resnet_weights, device)
    steps = settings.T if settings.dataset in BINNED else None
    try:
        return load_dataset(settings.dataset, arguments.data_dir, bins=settings.bins, dt=settings.dt, steps=steps)
    except MissingDataError as error:
        if "dataset" not in arguments:  # it is that of a checkpoint
            raise
        raise MissingDataError(f"{error}\n--dataset fashionmnist-mini needs no files at all.") from error


def load_run_data(arguments: argparse.Namespace, settings: TrainSettings, device: torch.device) -> ImageData:
    """The images or features that a run with ``settings`` used, on ``device``. Raises FlagError unless ``--samples`` is
    at least 1 and ``--resnet_weights`` are the run's, and DataError if the data are unavailable."""
    if wanted := COUNT.refuses(arguments.samples):
        raise FlagError(f"samples={arguments.samples} must be {wanted}")
    if settings.use_resnet:
        digest = weights_digest(settings.dataset, arguments.resnet_weights)
        if digest != settings.resnet_weights:
            differ = f"the run had the ResNet weights {settings.resnet_weights}, these are {digest}"
            raise FlagError(f"{differ}; give the file with the run's weights by --resnet_weights")
    return load_data(arguments, settings, device).limited(settings.limit_train, settings.limit_test).to(device)


def run_data_flags(settings: TrainSettings, data_dir: str, resnet_weights: str | None) -> str:
    """Flags, each after a space, with which programs with :func:`add_inspection_flags` find the data of a run."""
    given = {"data_dir": npz.directory_of(settings.dataset) or Path(data_dir), "resnet_weights": resnet_weights}
    usual = {"data_dir": Path("data"), "resnet_weights": None}
    return "".join(f" --{name} {quoted(value)}" for name, value in given.items() if value != usual[name])


def announce(settings: TrainSettings, machine: Machine) -> None:
    """Prints the machine and the settings that differ from the defaults; warns of settings without effect."""
    for line in settings.without_effect():
        logger.warning("%s", line)
    if settings.enforce_sparsity and settings.warmup_epochs >= settings.epochs:
        why = f"warmup_epochs={settings.warmup_epochs} is not below epochs={settings.epochs}"
        warn(f"warning: --enforce_sparsity never begins: {why}")
    default = {**type(settings)(neuron=settings.neuron).flag_values(), "neuron": type(settings).neuron}
    always = ("dataset", "model", "epochs", "seed")
    values = settings.flag_values().items()
    shown = " ".join(f"{name}={value}" for name, value in values if name in always or value != default[name])
    where = f"device={machine.device} backend={machine.backend or 'auto'}"
    where += f" processes={machine.world.size}" if machine.world.size > 1 else ""
    say(f"g2g {__version__} | {where} | {shown}")
