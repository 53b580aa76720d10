"""README and ``docs/`` say what is so: each of their commands runs, and the flags and defaults are the programs'.

What is not a program for users (``docs/draw_*.py``, ``tests``) has tests elsewhere;
``build``, ``mpi4py`` and ``venv`` are not ours.
"""

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from code_blocks import run_blocks
from helpers import ROOT
from small_data import fashion_mnist_files, publish_resnet, write, write_cifar, write_recordings, write_resnet

from g2gnet.programs import crossval, pretrain, train
from g2gnet.programs.flags import settings_from
from g2gnet.programs.pretrain import PretrainSettings
from g2gnet.training import TrainSettings
from g2gnet.training.cross_validation import FoldSettings

README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
#: what is in pages and in the programs' help, each command on one line
TEXT = re.sub(r"\\\n *", "", "\n".join([*PAGES, train.EXAMPLES, crossval.EXAMPLES]))
#: every command there; tests/test_packaging.py makes wheels
COMMANDS = re.findall(r"python (?!setup\.py)((?:-m (?!tests|build|mpi4py|venv))?[\w.]+(?![\w./])(?: [^`\n]*)?)", TEXT)
COMMANDS += re.findall(r"(?:^|`)(g2g-(?:analyze|export|pretrain|report|sweep) [^`\n]+)", TEXT, re.MULTILINE)
COMMANDS = [*dict.fromkeys(COMMANDS)]

#: what a user sees first, the README and the programs' help; the other examples run with ``pytest -m ci``
FIRST = re.sub(r"\\\n *", "", "\n".join([README, train.EXAMPLES, crossval.EXAMPLES]))

#: of each program: its module, its settings, and flags that make a run small without another name for its files
SMALL = "--hidden_dim 64 --batch_size 16 --dst_interval 2 --limit_test 20 --epochs 1 --warmup_epochs 0 --lr_warmup 1"
PROGRAMS = {
    "train.py": (train, TrainSettings, f"{SMALL} --limit_train 60"),
    "crossval.py": (crossval, FoldSettings, f"{SMALL} --k_folds 2"),
    "g2g-pretrain": (pretrain, PretrainSettings, "--epochs 1 --batch_size 16"),
}


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A directory with small files in the true format for every data set, and weights that pass for the published."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        write(root / "data", fashion_mnist_files(patch, train=60, test=20))
        write_cifar(patch, root / "data", "cifar10", train=50, test=20)
        write_cifar(patch, root / "data", "cifar100", train=200, test=20)
        write_recordings(root / "data")
        for name in ("cifar10", "cifar100"):
            publish_resnet(patch, root / "hub", name)
        yield root


@pytest.fixture
def workplace(small_world, tmp_path, monkeypatch):
    """An empty working directory beside that world, with the weights that ``g2g-pretrain`` would have written."""
    (tmp_path / "data").symlink_to(small_world / "data")
    write_resnet(tmp_path / "checkpoints" / "resnet32_cifar10.pt", "cifar10", seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: the module of each command that is installed
SCRIPTS = dict(re.findall(r'^(g2g-\w+) = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


def split(command):
    """The program and its arguments."""
    program = re.match(r"(-m )?\S+", command)[0]
    return program, shlex.split(command.removeprefix(program))


def run(program, arguments):
    module, kind, small = PROGRAMS[program]
    if "--start" in arguments:
        run("train.py", maker_of(arguments[arguments.index("--start") + 1]))
    if "--layers" in arguments:
        small = small.replace("--hidden_dim 64 ", "")
    arguments = [*arguments, *shlex.split(small)]
    parser = module.build_parser()
    assert module.main(arguments) == 0
    return settings_from(parser.parse_args(arguments), kind)


OF_PROGRAMS = [command for command in COMMANDS if split(command)[0] in PROGRAMS]


@pytest.mark.parametrize(
    "command", [pytest.param(each, marks=[] if each in FIRST else pytest.mark.ci) for each in OF_PROGRAMS]
)
def test_each_example_runs(workplace, command):
    program, arguments = split(command)
    settings = run(program, arguments)
    # what was run is what the README says, but for the flags that make it small
    module, _, small = PROGRAMS[program]
    asked = vars(module.build_parser().parse_args(arguments))
    for flag in re.findall(r"--(\w+)", command):
        if f"--{flag} " not in small and flag != "resnet_weights":
            assert getattr(settings, flag) == asked[flag], flag
    folds = getattr(settings, "k_folds", 0)
    stems = [settings.stem.replace("_fold1of2", f"_fold{fold}of2") for fold in range(1, folds + 1)] or [settings.stem]
    for stem in stems:
        assert (workplace / "checkpoints" / f"{stem}.DONE").exists()
        checkpoint = torch.load(workplace / "checkpoints" / f"{stem}.pth", weights_only=True)
        record = checkpoint["history"][-1]
        assert record["epoch"] == 1
        if getattr(settings, "sparsity_mode", "static") == "dynamic":
            if settings.final_density is not None:
                assert record["units_pruned"] > record["units_grown"]
                continue
            assert record["units_pruned"] == record["units_grown"]
            # the only update of so short a run is its last, for which a schedule leaves nothing to replace
            assert record["units_grown"] > 0 or settings.dst_schedule != "constant"
    if folds:
        assert len(json.loads((workplace / f"checkpoints/{settings.summary_stem}.json").read_text())["folds"]) == 2


@pytest.mark.ci
@pytest.mark.parametrize("command", [each for each in COMMANDS if each.endswith(".pth") and "*" not in each])
def test_each_example_with_checkpoints_runs_after_those_that_make_them(workplace, command):
    program, arguments = split(command)
    for argument in arguments:
        if argument.endswith(".pth"):
            run("train.py", maker_of(argument))
    assert importlib.import_module(SCRIPTS[program]).main(arguments) == 0


def maker_of(checkpoint):
    """The arguments of the command that makes a checkpoint."""
    makers = {stem_of(arguments): arguments for name, arguments in map(split, COMMANDS) if name == "train.py"}
    return makers[Path(checkpoint).stem]


def stem_of(arguments):
    asked = vars(train.build_parser().parse_args(arguments))
    return TrainSettings(**{name: asked[name] for name in TrainSettings().flag_values()}).stem


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in OF_PROGRAMS])
def test_other_commands_are_of_programs_that_have_these_flags(capsys, command):
    """Benchmarks run in tests of their own."""
    program, arguments = split(command)
    name = SCRIPTS.get(program, program.removeprefix("-m "))
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    # of several programs in one, the first words are which
    words = 1 if name == "benchmarks.study" else 2 if arguments[:2] == ["--kernel", "conv"] else 0
    which = arguments[:words]
    with pytest.raises(SystemExit) as stop:
        module.main([*which, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for argument in arguments:
        for flag in argument.split()[:1]:  # a value in quotes may be flags of another program, too
            assert not flag.startswith("-") or flag in text


def test_the_examples_are_complete():
    """Each data set with each model, with and without features, each pair of DST rules, and cross-validation."""
    seen = set()
    for program, arguments in map(split, COMMANDS):
        if program in ("train.py", "crossval.py"):
            module, kind, _ = PROGRAMS[program]
            asked = vars(module.build_parser().parse_args(arguments))
            settings = kind(**{name: asked[name] for name in kind().flag_values()})
            seen.add((program, settings.dataset, settings.model, settings.use_resnet))
            if settings.sparsity_mode == "dynamic":
                seen |= {(settings.cp, settings.cg), ("dynamic", settings.model), ("dynamic", settings.dataset)}
            if settings.enforce_sparsity:
                seen.add(("enforced", settings.model))
    models, sparse = ("dense", "index", "random", "mixer"), ("index", "random", "mixer")
    data = [("fashionmnist", False), ("cifar10", False), ("cifar100", False), ("cifar10", True), ("cifar100", True)]
    expected = {("train.py", name, model, features) for name, features in data for model in models}
    expected |= {("crossval.py", "fashionmnist", model, False) for model in models}
    expected |= {(prune, grow) for prune in ("set", "random", "hebb") for grow in ("hebb", "random")}
    expected |= {("dynamic", name) for name in (*sparse, "fashionmnist", "cifar10", "cifar100")}
    expected |= {("enforced", model) for model in models}
    assert expected <= seen


def test_the_flag_tables_are_those_of_the_parsers():
    spec = importlib.util.spec_from_file_location("draw_flags", ROOT / "docs" / "draw_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.page()
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == text, "run python docs/draw_flags.py"
    rows = dict(re.findall(r"^\| `--(\w+)[^`]*` \| `?([^`|]+?)`? \|", text.partition("## Flags of `crossval")[0], re.M))
    defaults = vars(train.build_parser().parse_args([]))
    assert {name.removeprefix("no_") for name in rows} == set(defaults)
    for name, default in defaults.items():
        assert default is None or rows[name] == ("off" if default is False else str(default)), name
    assert "| `--k_folds N` | `5` |" in text


def test_the_tests_that_a_page_names_exist():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")))
    assert len(named) > 50
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_each_page_that_installs_g2g_installs_the_pytorch_for_cpus_first():
    """Alone, pip would bring 5.6 GB of CUDA."""
    first = "python3 -m venv .venv\nsource .venv/bin/activate\n"
    first += "pip install uv\nuv pip install --torch-backend cpu torch torchvision"
    pages = [*PAGES, (ROOT / "CONTRIBUTING.md").read_text()]
    install = [page for page in pages if re.search(r"^(pip install -e \.|python3 -m venv)", page, re.MULTILINE)]
    assert [page.replace(" && ", "\n").count(first) for page in install] == [1, 1, 1], (
        "README, the page on installation, CONTRIBUTING"
    )


def test_the_python_example_runs_and_the_readme_is_short():
    net = run_blocks(ROOT / "README.md", {"2048": "256", "T=50": "T=5"})["net"]
    assert repr(net.fc2.mask).startswith("BlockMask(256×256, 8 groups (interleaved)")
    assert len(README.splitlines()) <= 110
