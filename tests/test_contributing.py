"""The contributor's table is true: options that are added in exactly the files that it names work everywhere; style,
types and the quick lane."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT
from quick import QUICK

from g2g_kernels import available_backends

ROWS = dict(re.findall(r"^\| an? ([\w ]+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M))

#: only the instruction set that every CPU has, unoptimised: a few seconds
COMPILER = """#!/bin/sh
case "$*" in -dumpmachine) echo any ;; *) exec {compiler} "$@" ;; esac
"""


def append(addition: str) -> Callable[[str], str]:
    return lambda text: f"{text}\n\n{addition}\n"


def replace(*edits: str) -> Callable[[str], str]:
    """Patterns, each of which is there once, and what takes their places, in turn."""

    def edit(text: str) -> str:
        for pattern, replacement in zip(edits[::2], edits[1::2], strict=True):
            text, times = re.subn(pattern, replacement, text)
            assert times == 1, f"{pattern} is {times} times in it"
        return text

    return edit


#: for each row of the table, what is written into which file. The toy surrogate is (α/4) / (1 + α/2·|x|)²; the toy
#: neuron is LIF with twice the current.
TOYS: dict[str, dict[str, Callable[[str], str]]] = {
    "surrogate": {
        "g2g_kernels/ops/neurons/surrogates.py": append("""\
SURROGATES["toy"] = Surrogate(
    lambda x, alpha: alpha / 4 / (1 + alpha / 2 * x.abs()) ** 2,
    lambda x, alpha: 0.5 + alpha / 4 * (_fast_sigmoid_primitive(x, alpha / 2) - 0.5),
)"""),
        "g2g_kernels/triton/neuron.py": replace('    if SURROGATE == "atan":\n', """    if SURROGATE == "toy":
        root = 1 + alpha * 0.5 * tl.abs(x)
        return alpha * 0.25 / (root * root)
    elif SURROGATE == "atan":
"""),
        "g2g_kernels/csrc/neurons.h": replace(r"(// All options, )", r"""struct ToySurrogate {
    static constexpr const char* name = "toy";
    static G2G_INLINE Vec derivative(Vec x, float alpha) {
        const Vec root = all(1.0f) + all(alpha / 2) * absolute(x);
        return all(alpha / 4) / (root * root);
    }
};
\1""", r"(using Surrogates = Types<.*)>;", r"\1, ToySurrogate>;"),
    },
    "neuron": {
        "g2g_kernels/ops/neurons/models.py": append("""\
def _toy_charge(states, fired, spike, current, parameters, reset):
    return _lif_charge(states, fired, spike, 2 * current, parameters, reset)


def _toy_charge_backward(*arguments):
    current, *rest = _lif_charge_backward(*arguments)
    return 2 * current, *rest


MODELS["toy"] = NeuronModel(
    "toy", ("leak", "threshold"), ("leak",), ("potential",), _toy_charge, _toy_charge_backward
)"""),
        "g2g_kernels/triton/neuron.py": replace(r"(\n\n@triton.jit\ndef charge\(.*\n)", r"""

@triton.jit
def _toy_charge_backward(grads, sums, states, fired, parameters, RESET: tl.constexpr):
    current, before, sums = _lif_charge_backward(grads, sums, states, fired, parameters, RESET)
    return 2 * current, before, sums
\1    if MODEL == "toy":
        return _lif_charge(states, fired, 2 * current, parameters, RESET)
""", r"(\ndef charge_backward\([^)]*\):.*\n)", r"""\1    if MODEL == "toy":
        return _toy_charge_backward(grads, sums, states, fired, parameters, RESET)
"""),
        "g2g_kernels/csrc/neurons.h": replace(r"(// A surrogate is )", r"""struct Toy {
    static constexpr ModelInfo info = {"toy", 1, 2, {"potential"}, {"leak", "threshold"}, {true}};
    template <class R>
    static G2G_INLINE void charge(Vec (&state)[1], Vec current, const Vec (&p)[2], R reset) {
        Lif::charge(state, current + current, p, reset);
    }
    template <class R, class Slope>
    static G2G_INLINE Vec charge_backward(Vec through, const Slope& slope, const Vec (&before)[1],
                                          const Vec (&p)[2], Vec (&g)[1], Vec (&grad)[2], R reset) {
        return all(2.0f) * Lif::charge_backward(through, slope, before, p, g, grad, reset);
    }
};
\1""", r"(using Models = Types<.*)>;", r"\1, Toy>;"),
        "g2gnet/neurons.py": append("""class Toy(SpikingNeurons):
    model = MODELS["toy"]
    initial = {"leak": 0.9, "threshold": 1.0}


NEURONS["toy"] = Toy"""),
    },
    "data set": {
        "g2gnet/data/catalog.py": append('DATASETS["toy"] = Dataset((3, 4), 3, "toy")'),
        "g2gnet/data/toy.py": append("""import torch

from g2gnet.data.image_data import ImageData


def load(name, data_dir):
    images, labels = torch.arange(720).remainder(251).to(torch.uint8).view(60, 12), torch.arange(60) % 3
    return ImageData(name, images, labels, images[:9], labels[:9], 3)"""),
    },
    "grouping": {
        "g2gnet/weights/patterns.py": replace(r"(\nGROUPINGS = {\n)", r'\1    "toy": ("random", "interleaved"),\n')
    },
    "sparsity pattern": {
        "g2gnet/weights/patterns.py": replace(
            r"(\nPATTERNS: .*\n)",
            r'\1    "toy_ring": lambda inside, between, mean: SmallWorld(inside, between, rewire=0.0),\n',
        )
    },
    "setting of networks": {
        "g2gnet/network_settings.py": replace(
            r"(\n    init_gain: float = )", r'\n    toy_gain: float = setting(1.0, "model", "a toy", low=0)\1'
        ),
        "g2gnet/network.py": replace(
            r"(\n        init_gain: float = .*)", r"\1\n        toy_gain: float = NetworkSettings.toy_gain,",
            r"(\n        self.enc = settings.enc\n)", r"\1        self.toy_gain = settings.toy_gain\n",
        ),
    },
    "prune or grow rule": {
        "g2gnet/dst/rules.py": append(
            'PRUNE_RULES["toy"] = Rule("toy", "least of the toy", lambda seen: -_weight(seen))\n'
            'GROW_RULES["toy"] = Rule("toy", "a unit of the toy", attrgetter("gradient"), GRADIENT)'
        )
    },
    "flag": {
        "g2gnet/training/run_settings.py": replace(
            r"(\n    precision: str = )", r'\n    toy: int = _training(7, "a toy", low=0)\1'
        )
    },
    "field of a connection": {
        "g2g_kernels/ops/g2g_stack/population.py": replace(
            r"(\n    onto: str \| None = None\n)", r"\1    toy_gain: torch.Tensor | None = None\n"
        ),
        "g2g_kernels/ops/g2g_stack/reference.py": replace(
            r'(\n    y = operators\["linear"\]\(.*\n)',
            r"\1    y = y if connection.toy_gain is None else y * connection.toy_gain\n",
        ),
    },
    "way of running a network": {
        "g2g_kernels/ops/g2g_stack/ways.py": append(
            "WAYS.register(ANY, reference.g2g_stack, lambda call: None if len(call.x) == 7 else 'needs 7 steps', 'toy')"
        ),
    },
}  # fmt: skip

#: what is tried with the toys; both passes of the toy neuron are LIF's with twice the current
TRIED = """
import sys

import torch

from g2g_kernels import BlockMask, GroupLayout, Connection, Neurons, Population, explain, g2g_stack, neurons
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2gnet.neurons import NEURONS
from g2gnet.network import G2GNet

draw = torch.Generator().manual_seed(0)
x, upstream = torch.randn(2, 6, 3, 5, generator=draw)
mask = BlockMask.full(GroupLayout(5, 1), GroupLayout(5, 1), 5)


def alone(x, population, backend):
    return neurons(x, population, backend=backend)


def stacked(x, population, backend):
    of_input = Connection("linear", torch.eye(5).unsqueeze(0), mask, -1)
    return g2g_stack(x, [Population(population, (of_input,))], backend=backend).counts.expand(6, 3, 5)


def run(operator, model, scale, surrogate, backend):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, torch.tensor(0.9), torch.tensor(0.5))]
    spikes = operator(leaves[0] * scale, Neurons(model, leaves[1:], "zero", surrogate), backend)
    (spikes * upstream).sum().backward()
    return [spikes, *(leaf.grad for leaf in leaves)]


for operator in (alone, stacked):
    expected = run(operator, "lif", 2, "toy", "torch")
    for backend in sys.argv[1:]:
        for ours, wanted in zip(run(operator, "toy", 1, "toy", backend), expected):
            torch.testing.assert_close(ours, wanted)

weights = torch.eye(5).unsqueeze(0)
of_input = Connection("linear", weights, mask, -1)


def one(**fields):
    return [Population(Neurons("lif", (0.9, 0.5)), (of_input._replace(**fields),))]


gain = torch.full((5,), 1.5, requires_grad=True)
scaled = (weights * 1.5).requires_grad_()
with_gain, without = (g2g_stack(x, each, backend="torch").counts for each in (one(toy_gain=gain), one(values=scaled)))
assert torch.equal(with_gain, without)
(of_gain,) = torch.autograd.grad((with_gain * upstream[0]).sum(), gain)
(of_values,) = torch.autograd.grad((without * upstream[0]).sum(), scaled)
torch.testing.assert_close(of_gain, (of_values[0] * torch.eye(5)).sum(1))
assert torch.equal(g2g_stack(x, one(toy_gain=gain)).counts, with_gain)  # of those that read it
reasons = explain(x, one(toy_gain=gain)).reasons
for way in ("cpu chain", "cpu graph") if "cpu" in sys.argv else ():
    assert reasons[way] == "does not read 'toy_gain' of a connection", reasons

chosen = explain(torch.randn(7, 3, 5, generator=draw), one(), backend="torch")
assert chosen.way.name == "toy", chosen
chosen = explain(x, one(), backend="torch")
assert (chosen.way.name, chosen.reasons["toy"]) == ("reference", "needs 7 steps"), chosen

first = torch.linspace(-1, 1, 9).unsqueeze(0)
for backend in sys.argv[1:]:
    one_step = first.clone().requires_grad_()
    neurons(one_step, Neurons("lif", (0.9, 0.25), surrogate="toy", alpha=3.0), backend=backend).sum().backward()
    torch.testing.assert_close(one_step.grad, 0.75 / (1 + 1.5 * (first - 0.25).abs()) ** 2)

net = G2GNet(12, 16, 3, model="toy", num_groups=2, block_size=4, T=3, neuron="toy")
assert [layer.mask.rows.layout.kind for layer, _ in net.layers()] == ["random", "interleaved", "random"]
assert isinstance(net.lif1, NEURONS["toy"])

first_row = G2GNet(12, 16, 8, model="toy_ring", num_groups=8, block_size=1).fc3.mask.to_dense()[0]
assert first_row[:2].all() and not first_row[4:14].any()

from g2gnet.programs.train import main

flags = "--toy_gain 3 --dataset toy --model toy --surrogate toy --neuron toy --sparsity_mode dynamic --cg toy --toy 8"
flags += " --cp toy"
sizes = "--hidden_dim 16 --num_groups 2 --block_size 4 --T 3 --epochs 1 --batch_size 4 --dst_interval 5 --p_inter 0.5"
sys.exit(main([*flags.split(), *sizes.split(), "--json", "run.json"]))
"""


def links_of(row: str) -> set[str]:
    """The files, folders and pages to which a row of the table leads."""
    return set(re.findall(r"\]\((\S+)\)", ROWS[row]))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the library with every toy in it, compiled."""
    folder = tmp_path_factory.mktemp("tree")
    for package in ("g2g_kernels", "g2gnet"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "setup.py", folder)
    for edits in TOYS.values():
        for name, edit in edits.items():
            file = folder / name
            file.write_text(edit(file.read_text(encoding="utf-8") if file.exists() else ""), encoding="utf-8")
    if "cpu" in available_backends():
        compiler = folder / "compiler"
        compiler.write_text(COMPILER.format(compiler=os.environ.get("CXX", "c++")))
        compiler.chmod(0o755)
        build = "from pathlib import Path; import setup; setup.build_library(setup.library(), Path('objects'))"
        done = run(folder, "-c", build, CXX=str(compiler), G2G_CXXFLAGS="-O0")
        assert done.returncode == 0, done.stderr
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_table_names_the_files_that_a_toy_needs_and_everything_that_it_names_exists():
    """A new module has no link: the row says what it lies beside."""
    for row, files in TOYS.items():
        named = {name for name in links_of(row) if not name.endswith(".md")}
        assert named == {name for name in files if (ROOT / name).exists()}, row
    for row in ROWS:
        assert links_of(row)
        for name in links_of(row):
            assert (ROOT / name).exists(), f"the table names {name}, which is not there"


@pytest.mark.ci
def test_what_is_added_by_the_table_works_on_every_backend_and_from_the_command_line(tree):
    backends = [name for name in ("torch", "cpu", "triton") if name in available_backends()]
    done = run(tree, "-c", TRIED, *backends, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"toy_gain": 3.0' in (tree / "run.json").read_text(encoding="utf-8")
    assert '"toy": 8' in (tree / "run.json").read_text(encoding="utf-8")


def test_every_file_that_a_documented_command_names_is_there():
    """What the commands of programs do, ``test_readme.py`` tests, and ``test_docs.py`` the blocks of Python."""
    named = set()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for block in re.findall(r"^```(?:sh|bat)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            named |= set(re.findall(r"(?<![\w/.-])(?:\./)?((?:\.ci|tests|docs|benchmarks|examples)/[\w./-]*\w)", block))
    assert {".ci/run", "tests/sanitize.sh", "tests/golden_bits.py"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_quick_lane_lists_tests_that_there_are():
    for name in QUICK:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name
    assert len(set(QUICK)) == len(QUICK)


@pytest.mark.parametrize("tool", ["ruff check .", "ruff format --check .", pytest.param("mypy", marks=pytest.mark.ci)])
def test_style_and_types(tool):
    result = subprocess.run([sys.executable, "-m", *tool.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
