"""Modules import downwards only, in the order of :data:`LAYERS`, and never in a circle. Imports inside functions count,
those for type checkers do not."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

#: of each package its modules, or folders of them, from the bottom to the top
LAYERS = {
    "g2g_kernels": (
        ("numbers", "choices", "tracing", "device"),
        ("mask", "dispatch"),
        ("cpu", "triton"),
        ("backends",),
        ("ops.derivatives", "ops.checks", "ops.record", "ops.flops"),
        ("ops.neurons", "ops.g2g_linear", "ops.g2g_conv2d"),
        ("ops.g2g_stack",),
        ("ops", "doctor", "first_use", ""),
    ),
    "g2gnet": (
        ("base",),
        ("weights",),
        ("layers", "convolution", "neurons", "encoding", "sequences", "data"),
        ("images",),
        ("graphs", "called_layers", "selections", "notation"),
        ("projections",),
        ("spiking_network",),
        ("stack", "network_settings"),
        ("network", "sparsify", "activity_recorder", "interop"),
        ("dst", "inspect"),
        ("training",),
        ("programs",),
        ("__main__", ""),
    ),
}


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


def layer_of(package: str, module: str) -> int:
    """The number of the layer of the longest name that is this module or a folder around it."""
    names = {name: number for number, layer in enumerate(LAYERS[package]) for name in layer}
    return names[max((name for name in names if f"{module}.".startswith(f"{name}." if name else "")), key=len)]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of which each imports another one of them; empty if no module imports itself by others."""
    left = dict(imports)
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    return sorted(left)


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_or_folder_imports_itself_by_others_and_all_import_from_lower_layers_only(package):
    imports, folders = imports_of(package), {}
    assert set().union(*LAYERS[package]) <= imports.keys() | {""}
    assert circle(imports) == []
    for module, others in imports.items():
        folder = module.partition(".")[0]
        folders.setdefault(folder, set()).update({other.partition(".")[0] for other in others} - {folder})
    assert circle(folders) == []
    pairs = [(module, other) for module, others in imports.items() for other in others]
    assert [f"{a} → {b}" for a, b in pairs if layer_of(package, b) > layer_of(package, a)] == []


def test_networks_know_nothing_of_data_sets():
    networks, found, pending = imports_of("g2gnet"), set(), {"stack", "network"}
    while pending:
        found |= pending
        pending = set().union(*(networks[module] for module in pending)) - found
    assert not [module for module in found if f"{module}.".startswith("data.")]


def test_imports_layers_and_circles_are_found():
    imports = imports_of("g2g_kernels")
    assert {"cpu.library", "mask.unit_grid", "ops.record"} <= imports["ops.g2g_stack.cpu"]
    assert "ops.neurons.triton" in imports["ops.neurons"], "imported inside a function"
    layers = [layer_of("g2g_kernels", module) for module in ("ops.neurons.models", "ops.g2g_stack.call", "")]
    assert layers == sorted(set(layers))
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


#: what an import could change of Python and PyTorch, by name
STATE = """
import logging, random, signal, sys, warnings
import numpy, torch, torch.optim.optimizer

SLOW = "torch.utils.flop_counter", "triton", "torch._dynamo", "torch._inductor", "sympy"
SLOW += "torchvision", "torch.utils.tensorboard", "tensorboard", "sklearn", "scipy", "pandas", "matplotlib", "snntorch"

def state():
    found = {
        "sys.meta_path": list(sys.meta_path),
        "what takes long to import": [name for name in sys.modules if name.startswith(SLOW)],
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


@pytest.mark.ci
def test_importing_changes_nothing_of_python_and_pytorch():
    done = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")
