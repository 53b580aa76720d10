"""The README says what is so: its flags, defaults and commands are the program's."""

import json
import re
import shlex
from pathlib import Path

import pytest

import crossval
import train
from g2gnet.training import TrainSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python train\.py ([^`\n]*)", README)
#: what stands in the tables for a default of None
WITHOUT_VALUE = {"limit_train": "all", "limit_test": "all", "resnet_weights": "published"}


def flag_rows(program):
    """Flags and defaults in the tables of the program's section."""
    section = README.partition(f"## Flags of `{program}`\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `--(\w+)` \| `?([^`|]+?)`? \|", section, flags=re.MULTILINE))


def test_the_flag_tables_are_complete_and_their_defaults_right():
    rows = flag_rows("train.py")
    defaults = vars(train.build_parser().parse_args([]))
    assert set(rows) == set(defaults)
    assert flag_rows("crossval.py") == {
        name: str(value)
        for name, value in vars(crossval.build_parser().parse_args([])).items()
        if name not in defaults or value != defaults[name]
    }
    for name, default in defaults.items():
        expected = "off" if default is False else WITHOUT_VALUE.get(name, str(default))
        assert rows[name] == expected, name


@pytest.mark.parametrize("command", COMMANDS)
def test_example_commands_have_settings_that_work(command):
    arguments = vars(train.build_parser().parse_args(shlex.split(command)))
    names = TrainSettings().as_dict()
    settings = TrainSettings(**{name: arguments[name] for name in names})
    assert settings.stem


def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    # the same program at a tenth of the size
    exec(compile(example.replace("2048", "256").replace("T=50", "T=5"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("BlockMask(256×256, 8 groups (interleaved)")


def test_the_speed_table_shows_what_was_recorded():
    record = json.loads((ROOT / "benchmarks/results/step-2-core-zen4.json").read_text())
    timed = {entry["contender"]: entry for entry in record["contenders"] if entry["status"] == "timed"}
    rows = re.findall(r"^\| (.+) \| ([\d.]+) s \| ([\d.]+)(?: ×)? \| (\d+) MB \|$", README, flags=re.MULTILINE)
    ours = ["g2g-cpu", "g2g-cpu-bf16", "g2g-torch"]
    names = [*ours, "snntorch-masked", "snntorch-dense", "spikingjelly-dense", "dense-lif"]
    assert len(rows) == len(timed) == len(names)
    baseline = timed["snntorch-masked"]["median"]
    for name, (_, median, ratio, megabytes) in zip(names, rows, strict=True):
        # half a unit of the last digit shown
        assert float(median) == pytest.approx(timed[name]["median"], abs=0.0051), name
        assert float(ratio) == pytest.approx(baseline / timed[name]["median"], abs=0.051), name
        assert int(megabytes) == pytest.approx(timed[name]["peak_bytes"] / 1e6, abs=0.51), name
