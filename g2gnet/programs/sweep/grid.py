"""The grid of a sweep, in which each setting has one value or several, and the runs that it describes."""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from g2gnet.base.files import read_file
from g2gnet.base.messages import reason
from g2gnet.network_settings import SettingsError, types_of
from g2gnet.programs import train
from g2gnet.programs.flags import settings_from
from g2gnet.training import TrainSettings
from g2gnet.training.checkpoints import RunFiles

#: settings of ``g2g-train`` by name, each with one value or an iterable of values
Grid = Mapping[str, Any]

#: the file in a run's folder with what the run printed
LOG = "log.txt"
#: numbers of characters in a folder's name: of the settings that differ, and of the hash of all settings
READABLE, DIGITS = 100, 8
#: text that stands for a value
WORDS = {"true": True, "false": False, "none": None}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: the settings that the grid gave, all settings, those that have several values in the grid,
    and the folder of its files and of what it printed, ``log.txt``.

    Example:
        >>> from g2gnet.programs.sweep.grid import runs_of
        >>> first = runs_of({"p_inter": [0.1, 0.3], "model": "mixer"}, "sweep")[0]
        >>> first.label, first.settings.p_inter
        ('p_inter=0.1', 0.1)
    """

    given: Mapping[str, Any]
    settings: TrainSettings
    differs: Mapping[str, Any]
    folder: Path

    @property
    def label(self) -> str:
        return in_words(self.differs) or "the run"

    @property
    def files(self) -> RunFiles:
        """The files that the trainer writes."""
        return RunFiles(self.folder, self.settings.stem)


def in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def read_grid(path: Path | str) -> dict[str, Any]:
    """The grid in a TOML or JSON file: settings, each one value or a list. Raises SettingsError if unreadable."""
    try:
        text = read_file(path).decode("utf-8")
        if str(path).endswith(".json"):
            return dict(json.loads(text))
        import tomllib  # since Python 3.11

        return tomllib.loads(text)
    except ImportError as error:
        raise SettingsError(f"grid={path}: TOML needs Python 3.11 or newer; give the same as a .json file") from error
    except OSError as error:
        raise SettingsError(f"grid={path} cannot be read ({reason(error)})") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise SettingsError(f"grid={path} is not a table of settings ({reason(error)})") from error


def arguments_of(given: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of ``g2g-train`` with these values by name, others with their defaults."""
    return argparse.Namespace(**{**vars(train.build_parser().parse_args([])), **given})


def runs_of(grid: Grid, folder: Path | str) -> list[Run]:
    """The runs of a grid, one per combination of its values, in the order of the seeds.

    A run's folder is found by the settings that differ from the defaults, so a grid that grows keeps its finished runs.
    Raises SettingsError for an unknown name, a setting without a value, invalid settings, two equal runs, or several
    values of a setting that has an effect in no run, and DataError if a file of data or of weights cannot be read.
    """
    kinds, values = types_of(TrainSettings), {}
    for name, given in grid.items():
        if name not in TrainSettings().flag_values():
            raise SettingsError(f"{name} is not a setting; g2g-train --help lists them")
        several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
        values[name] = [_value(value, kinds[name]) for value in (given if several else [given])]
        if not values[name]:
            raise SettingsError(f"{name} has no value; give one, or leave it out")
    runs: dict[str, Run] = {}
    order = sorted(values, key=lambda name: name != "seed")  # the runs of the first seed come first
    for combination in itertools.product(*(values[name] for name in order)):
        given = dict(zip(order, combination, strict=True))
        if "seed" in given:
            given["seed"] = given.pop("seed")  # last in labels
        differs = {name: value for name, value in given.items() if len(values[name]) > 1}
        settings = settings_from(arguments_of(given), TrainSettings)
        digest = _digest(settings)
        words = "-".join(f"{name}{value}" for name, value in differs.items()) or "run"
        path = Path(folder) / f"{re.sub(r'[^A-Za-z0-9._]+', '-', words)[:READABLE]}-{digest}"
        existing = sorted(Path(folder).glob(f"*-{digest}"))
        run = Run(given, settings, differs, existing[0] if existing else path)
        if digest in runs:  # such as a number and its default; they would count as two runs in a mean
            raise SettingsError(f"{runs[digest].label} and {run.label} make the same run; leave one of them out")
        runs[digest] = run
    every = [vars(run.settings) for run in runs.values()]
    idle = [TrainSettings.idle(each) for each in every]
    for name in values:
        if len(values[name]) > 1 and all(name in each for each in idle):
            need = idle[0][name]
            why = f"has several values, but no effect {need.unmet(every[0])}"
            raise SettingsError(f"{name} {why}; {need.remedy()}, or one value")
    return list(runs.values())


def _value(value: Any, kinds: Collection[Any]) -> Any:
    """A value as settings hold it. Flags and files give numbers, lists, true, false and none as text, too."""
    if isinstance(value, str) and str not in kinds:
        if value.lower() in WORDS:
            return WORDS[value.lower()]
        with contextlib.suppress(ValueError):  # settings refuse other text
            numbers = tuple(map(float if float in kinds else int, value.split(",")))
            return numbers if len(numbers) > 1 or bool in kinds else numbers[0]
    if isinstance(value, list):
        return tuple(value)
    return float(value) if float in kinds and type(value) is int else value


def _digest(settings: TrainSettings) -> str:
    """Identifies settings. A setting of a later version does not change it while it has its default."""
    default = TrainSettings(neuron=settings.neuron).as_dict()
    changed = {name: value for name, value in settings.as_dict().items() if value != default[name]}
    text = json.dumps({**changed, "neuron": settings.neuron}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
