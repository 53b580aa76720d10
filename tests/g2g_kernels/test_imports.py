"""Modules import downwards only, in the order of :data:`LAYERS`, and never in a circle.

Imports inside functions count, those for type checkers do not.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

#: modules of ``g2g_kernels``, or packages of them, from the bottom to the top
LAYERS = (
    ("numbers", "choices", "tracing", "device"),
    ("groups", "sides", "packing", "unit_grid", "graph", "wiring", "sampling", "block_mask", "dispatch"),
    ("cpu", "triton"),
    ("backends",),
    ("ops.derivatives", "ops.checks", "ops.record", "ops.flops"),
    ("ops.neurons", "ops.g2g_linear"),
    ("ops.g2g_stack",),
    ("ops", "doctor", ""),
)


#: parts of ``g2gnet``, each with those above it
ABOVE = (("stack", "data"), ("network", "data"), ("data", "training"), ("training", "cli"), ("training", "report"))


@functools.cache
def imports_of(name: str) -> dict[str, set[str]]:
    """Of each module of a package by its name in it, the modules of the package that it imports when it runs."""
    package = ROOT / name
    files: dict[str, Path] = {}
    for file in package.rglob("*.py"):
        parts = [*package.parts[-1:], *file.relative_to(package).with_suffix("").parts]
        files[".".join(parts).removesuffix(".__init__")] = file
    imports = {}
    for module, file in files.items():
        names = set()
        for node in walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} has a relative import"
                inside = (f"{node.module}.{alias.name}" for alias in node.names)
                names |= {name if name in files else str(node.module) for name in inside}
        imports[module] = names & set(files) - {module}
    return {short(module): {short(name) for name in names} for module, names in imports.items()}


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, but for those under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"):
            yield from walk(child)


def short(module: str) -> str:
    """Its name in the package, of the package itself ""."""
    return module.partition(".")[2]


def layer_of(module: str) -> int:
    """The number of the layer of the longest name that is this module or a package around it."""
    names = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    return names[max((name for name in names if f"{module}.".startswith(f"{name}." if name else "")), key=len)]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of which each imports another one of them; empty if no module imports itself by others."""
    left = dict(imports)
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    return sorted(left)


@pytest.mark.parametrize("package", ["g2g_kernels", "g2gnet"])
def test_no_module_imports_itself_by_others(package):
    assert circle(imports_of(package)) == []


def test_kernels_know_nothing_of_networks():
    files = (ROOT / "g2g_kernels").rglob("*.py")
    assert not [file for file in files if re.search(r"^\s*(from|import) g2gnet\b", file.read_text("utf-8"), re.M)]


@pytest.mark.parametrize(("part", "above"), ABOVE)
def test_a_part_of_g2gnet_imports_nothing_from_above_it(part, above):
    networks = imports_of("g2gnet")
    found, pending = set(), {module for module in networks if f"{module}.".startswith(f"{part}.")}
    assert pending
    while pending:
        found |= pending
        pending = set().union(*(networks[module] for module in pending)) - found
    assert not [module for module in found if f"{module}.".startswith(f"{above}.")]


def test_modules_import_from_lower_layers_only():
    imports = imports_of("g2g_kernels").items()
    upwards = [f"{m} → {other}" for m, others in imports for other in others if layer_of(other) > layer_of(m)]
    assert upwards == []


def test_imports_are_found():
    imports = imports_of("g2g_kernels")
    assert {"cpu.library", "unit_grid", "ops.record"} <= imports["ops.g2g_stack.cpu"]
    assert "ops.neurons.triton" in imports["ops.neurons"], "imported inside a function"
    assert layer_of("ops.neurons.models") < layer_of("ops.g2g_stack.call") < layer_of("")


@pytest.mark.parametrize("name", sorted({name for layer in LAYERS for name in layer if name}))
def test_every_named_module_exists(name):
    assert name in imports_of("g2g_kernels")


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


#: what an import could change of Python and PyTorch, by name
STATE = """
import logging, random, signal, sys, warnings
import numpy, torch, torch.optim.optimizer

def state():
    found = {
        "sys.meta_path": list(sys.meta_path),
        "what takes long to import": [name for name in ("torch.utils.flop_counter", "triton") if name in sys.modules],
        "sys.path_hooks": list(sys.path_hooks),
        "sys.excepthook": sys.excepthook,
        "warnings": list(warnings.filters),
        "logging": (list(logging.root.handlers), logging.root.level),
        "torch's RNG": torch.get_rng_state().tolist(),
        "random's": random.getstate(),
        "numpy's": [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "denormals": bool(torch.full((), 2e-38) * 0.5 == 0),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
    }
    for module in (sys.modules["torch.optim.optimizer"], torch.nn.modules.module):
        names = [name for name in vars(module) if name.startswith("_global_") and "hooks" in name]
        assert names
        found |= {f"{module.__name__}.{name}": dict(getattr(module, name)) for name in names}
    for name, module in pytorch.items():  # functions and classes that someone replaces
        found |= {f"{name}.{each}": value for each, value in dict(vars(module)).items() if callable(value)}
    return found

pytorch = {name: module for name, module in dict(sys.modules).items() if name.partition(".")[0] == "torch"}
before = state()
import g2g_kernels, g2gnet
after = state()
print(*(name for name in before if before[name] is not after[name] and before[name] != after[name]), sep="\\n")
"""


def test_importing_changes_nothing_of_python_and_pytorch():
    done = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")
