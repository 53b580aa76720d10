"""The C interface of the compiled CPU kernels: what is refused when it is loaded, and what each of its files holds."""

import ctypes
import os
import re
import shutil
import subprocess

import pytest
import torch
from helpers import ROOT

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.cpu import interface, library
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.plans import plan_for
from g2g_kernels.ops.neurons.cpu import neuron_arguments
from g2g_kernels.ops.neurons.models import MODELS, RESETS, Neurons
from g2g_kernels.ops.neurons.surrogates import SURROGATES

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


def _reason() -> str | None:
    """Why a library loaded now would be refused."""
    return library._load.__wrapped__()[1]


def test_the_library_says_what_is_mirrored():
    assert _reason() is None


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("int32_t per_neuron;", "int32_t per_neuron, more;", "Parameter.more is 'missing' there"),
        ("int32_t x_spikes;", "", r"Stack.x_spikes is 'field \d+, int32_t' there and 'missing' here"),
        ("double input_rate;", "float input_rate;", r"Layer.input_rate is 'field \d+, double' there"),
        ("int32_t size, num_units", "int32_t num_units, size", "Side.size is 'field 1, int32_t' there"),
        ("kMostParameters = 6;", "kMostParameters = 4;", "kMostParameters is '6' there and '4' here"),
    ],
)
def test_a_library_with_other_fields_is_refused_by_the_name_of_the_first(old, new, difference, monkeypatch):
    text = interface.declarations()
    assert text.count(old) == 1
    monkeypatch.setattr(library, "declarations", lambda: text.replace(old, new))
    assert re.search(rf"was built from another version of g2g \({difference}", _reason())


@pytest.mark.parametrize(
    ("name", "names", "difference"),
    [
        ("resets", ("zero", "subtract"), f"resets is '{' '.join(RESETS)}' there and 'zero subtract' here"),
        ("surrogates", (*SURROGATES, "more"), f"surrogates is '{' '.join(SURROGATES)}' there and"),
        ("models", (*MODELS, "more"), "models is 'lif synaptic.*' there and 'lif synaptic.* more' here"),
        ("lif.parameters", ("threshold", "beta"), "lif.parameters is 'beta threshold' there and 'threshold beta' here"),
        ("lif.decays", (), "lif.decays is 'beta' there and '' here"),
    ],
)
def test_a_library_with_other_options_of_neurons_is_refused(name, names, difference, monkeypatch):
    monkeypatch.setitem(library.OPTIONS, name, names)
    assert re.search(rf"\({difference}", _reason())


def test_a_model_may_have_no_decays():
    said = library.library().g2g_interface().decode()
    difference = library._difference(said.replace("lif.decays: beta", "lif.decays:", 1))
    assert difference == "lif.decays is '' there and 'beta' here"


def test_a_field_that_there_is_none_of_is_refused():
    with pytest.raises(AttributeError, match="gain"):
        structures.Layer(gain=1)
    with pytest.raises(AttributeError, match="gain"):
        structures.Layer().gain = 1


def test_the_structures_lie_in_memory_as_the_compiler_lays_them_out(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("needs a C++ compiler")
    lines = ["#include <cstddef>", '#include "structures.h"']
    for name, structure in vars(structures).items():
        lines.append(f"static_assert(sizeof(g2g::{name}) == {ctypes.sizeof(structure)});")
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            place = getattr(place, "field", place)
            lines.append(f"static_assert(offsetof(g2g::{name}, {field}) == {place.offset});")
            lines.append(f"static_assert(sizeof(g2g::{name}::{field}) == {place.size});")
    assert len(lines) > 100
    program = tmp_path / "layout.cpp"
    program.write_text("\n".join(lines))
    command = [compiler, "-std=c++17", "-fsyntax-only", "-I", str(ROOT / "g2g_kernels" / "csrc"), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("option", "number"),
    [
        (option, number)
        for option, names in (("model", MODELS), ("reset", RESETS), ("surrogate", SURROGATES))
        for number in (-1, len(names), 2**31 - 1)
    ],
)
@pytest.mark.parametrize("kernel", ["g2g_neurons", "g2g_stack"])
def test_a_number_that_no_option_has_is_refused(option, number, kernel):
    """Both kernels choose by all three options. The number stops a call before it reads anything."""
    values = torch.ones(1), torch.ones(1)
    neurons = neuron_arguments(Neurons("lif", values))
    setattr(neurons, option, number)
    if kernel == "g2g_neurons":
        tensor = torch.zeros(2, 1)
        arguments = structures.NeuronLoop(neurons=neurons, samples=1, size=1, steps=2, threads=1, every=5)
        arguments.current = arguments.grad_spikes = arguments.grad_current = tensor.data_ptr()
    else:
        plan = plan_for(BlockMask.full(GroupLayout(1, 1), GroupLayout(1, 1), 1).tensors(), torch.ones(1, 1, 1))
        layer = structures.Layer(neurons=neurons, plan=plan.address)
        arguments = structures.Stack(layers=ctypes.addressof(layer), count=1, batch=1, steps=2, threads=1)
    with pytest.raises(ValueError, match="lack this neuron model, reset or surrogate; rebuild them"):
        library.run(getattr(library.library(), kernel), arguments, backward=True)


def test_intrinsics_are_in_one_file_and_the_map_names_every_file():
    folder = ROOT / "g2g_kernels" / "csrc"
    sources = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.suffix != ".md"}
    assert [name for name, text in sources.items() if re.search(r"\b_mm\d*_|\b__m\d+|immintrin", text)] == ["vec.h"]
    named = set(re.findall(r"`(\w+\.(?:h|cpp))`", (folder / "README.md").read_text(encoding="utf-8")))
    assert named == set(sources)
