"""The grid of a sweep: each setting has one value or several; and the runs that it consists of."""

import argparse
import dataclasses
import difflib
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
#: of a folder's name: characters that say what differs, and hexadecimal digits of the SHA-256 of a run's settings
READABLE, DIGITS = 100, 8


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: the settings that the grid gave, all of them, those that have several values in the grid, and
    the folder of its files and of what it printed, ``log.txt``.

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
        """What differs, in words."""
        return ", ".join(f"{name}={value}" for name, value in self.differs.items()) or "the run"

    @property
    def files(self) -> RunFiles:
        """The files that the trainer writes."""
        return RunFiles(self.folder, self.settings.stem)


def read_grid(path: Path | str) -> dict[str, Any]:
    """The grid in a TOML or JSON file: settings, each one value or a list. Raises SettingsError if unreadable."""
    path = Path(path)
    try:
        text = read_file(path).decode("utf-8")
        if path.suffix == ".json":
            grid = json.loads(text)
        else:
            import tomllib  # since Python 3.11

            grid = tomllib.loads(text)
        if not isinstance(grid, dict):
            raise ValueError(f"it holds a {type(grid).__name__}, not a table of settings")
    except ImportError as error:
        raise SettingsError(f"grid={path}: TOML needs Python 3.11 or newer; give the same as a .json file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"grid={path} cannot be read ({reason(error)})") from error
    return grid


def values_of(grid: Grid) -> dict[str, list[Any]]:
    """The values of each setting of a grid, as a list: whole numbers as floats where fractions are possible, the word
    ``none`` as None for a number that may be left out. Raises SettingsError for an unknown name, a setting without a
    value, or a value that is listed twice.
    """
    kinds_of, known = types_of(TrainSettings), list(TrainSettings().flag_values())
    found: dict[str, list[Any]] = {}
    problems = []
    for name, given in grid.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            problems.append(
                f"{name} is not a setting; {f'did you mean {near[0]}?' if near else 'see g2g-train --help'}"
            )
            continue
        several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
        found[name] = values = [_value(value, kinds_of[name]) for value in (given if several else [given])]
        if not values:
            problems.append(f"{name} has no value; give one, or leave it out")
        problems += [f"{name}={value} is given twice" for n, value in enumerate(values) if value in values[:n]]
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def _value(value: Any, kinds: Collection[Any]) -> Any:
    if value == "none" and type(None) in kinds and str not in kinds:  # flags and TOML cannot say it in another way
        return None
    if isinstance(value, list):
        return tuple(value)
    return float(value) if float in kinds and type(value) is int else value


def arguments_of(given: Mapping[str, Any]) -> argparse.Namespace:
    """What ``g2g-train`` reads from these flags, by name; the others have their defaults."""
    return argparse.Namespace(**{**vars(train.build_parser().parse_args([])), **given})


def runs_of(grid: Grid, folder: Path | str) -> list[Run]:
    """The runs of a grid, one per combination of its values, those with the first seed first. A run's folder is found
    by the settings that differ from the defaults: a grid that grows keeps its finished runs. Raises SettingsError for
    invalid settings, or two runs or folders that are the same, each named, and DataError if a file of data or of
    weights cannot be read.
    """
    values = values_of(grid)
    runs: dict[str, Run] = {}
    problems = []
    order = sorted(values, key=lambda name: name != "seed")
    for combination in itertools.product(*(values[name] for name in order)):
        chosen = dict(zip(order, combination, strict=True))
        given = {name: chosen[name] for name in sorted(values, key=lambda name: name == "seed")}
        differs = {name: value for name, value in given.items() if len(values[name]) > 1}
        try:
            settings = settings_from(arguments_of(given), TrainSettings)
        except SettingsError as error:
            problems += str(error).splitlines()
            continue
        digest = _digest(settings)
        words = "-".join(f"{name}{value}" for name, value in differs.items()) or "run"
        path = Path(folder) / f"{re.sub(r'[^A-Za-z0-9._]+', '-', words)[:READABLE]}-{digest}"
        existing = sorted(Path(folder).glob(f"*-{digest}")) or [path]
        run = Run(given, settings, differs, existing[0])
        alike = runs.setdefault(digest, run)
        if alike is not run:  # as a number and its default, which would count as two runs in a mean
            problems.append(f"{alike.label} and {run.label} make the same run; leave one of them out")
    if problems:
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    return list(runs.values())


def _digest(settings: TrainSettings) -> str:
    """What tells settings apart; those of a later version do not change it while they have their defaults."""
    default = TrainSettings(neuron=settings.neuron).as_dict()
    changed = {name: value for name, value in settings.as_dict().items() if value != default[name]}
    text = json.dumps({**changed, "neuron": settings.neuron}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
