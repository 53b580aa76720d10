"""The kinds of numbers: what each refuses, that no field of the C interface is cut off, and sizes beyond 32 bits."""

import ctypes
import math

import pytest
import torch
from helpers import lif_layer

from g2g_kernels import BackendError, BlockMask, GroupLayout, g2g_linear, g2g_stack, lif, lif_step, synaptic
from g2g_kernels.cpu import library, plans
from g2g_kernels.cpu.interface import structures
from g2g_kernels.numbers import COUNT, PROBABILITY, SHARPNESS, SIZE, Number

compiled = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))
MANY = 2**31 + 3


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        (COUNT, (1, 2**63 - 1), (0, -1, 2**63, 10**26, 1.0, 1.5, True, "1", None, math.nan, math.inf), "whole number"),
        (SIZE, (1, 2**31 - 1), (0, 2**31, 10**26), "a whole number from 1 to 2147483647"),
        (PROBABILITY, (0, 1e-310, 0.5, 1), (-0.1, 1.1, math.nan, "x", None), "a number from 0 to 1"),
        (SHARPNESS, (1e-37, 2, 1e38), (0, -1, 1e-310, 1e300, math.inf, math.nan, True), "a number above 0"),
        (Number(), (0, -1e30, 1e-310), (1e300, -1e39, 10**400, math.inf, math.nan), "a finite number"),
        (Number(0, 1, open_high=True), (0, 0.999), (1, 1.5), "a number of at least 0 and below 1"),
    ],
)
def test_a_number_of_another_kind_is_named_with_the_one_wanted(kind, good, bad, words):
    for value in good:
        kind.check("x", value)
    for value in bad:
        with pytest.raises(ValueError, match=words) as error:
            kind.check("x", value)
        assert str(error.value).startswith(f"x={value!r:.40} must be")


#: of each C type, numbers that it holds, and numbers that it would cut off or make infinite
HELD = {
    ctypes.c_int32: ((-(2**31), 2**31 - 1), (2**31, -(2**31) - 1, MANY)),
    ctypes.c_int64: ((-(2**63), 2**63 - 1), (2**63, 10**26)),
    ctypes.c_float: ((0.5, 3.4e38, math.inf), (1e39, -1e300)),
}


@pytest.mark.parametrize("name", vars(structures))
def test_every_field_of_the_c_interface_holds_what_it_is_given_or_refuses_it(name):
    structure = getattr(structures, name)
    numbers = [(field, kind) for field, kind, *_ in structure._fields_ if kind in HELD]
    assert numbers or name not in ("Stack", "Linear", "NeuronLoop")
    for field, kind in numbers:
        held, refused = HELD[kind]
        for value in held:
            assert getattr(structure(**{field: value}), field) == pytest.approx(value, rel=1e-6)
        for value in refused:
            for give in (lambda name, value: structure(**{name: value}), structure().__setattr__):
                with pytest.raises(OverflowError, match=rf"{field}=.* does not fit"):
                    give(field, value)


@compiled
def test_functions_of_the_c_interface_refuse_numbers_beyond_their_types():
    for name, place in (("g2g_plan_new", 4), ("g2g_unpack", 2), ("g2g_unpack", 3), ("g2g_unpack", 4)):
        function = getattr(library.library(), name)
        arguments = [1 if kind is library._Int32 else None for kind in function.argtypes]
        arguments[place] = MANY
        with pytest.raises(ctypes.ArgumentError, match="does not fit an argument"):
            function(*arguments)


def one_layer():
    mask = BlockMask.full(GroupLayout(1, 1), GroupLayout(1, 1), 1)
    return lif_layer(torch.ones(1, 1, 1), mask, None, torch.tensor(0.9), torch.tensor(1.0))


@compiled
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lif(torch.zeros(1, 1), 0.9, 1.0, steps=MANY, backend="cpu"), "2147483647 steps, not 2147483651"),
        (lambda: lif(torch.zeros(1).expand(MANY, 1), 0.9, 1.0, backend="cpu"), "2147483647 steps"),
        (lambda: synaptic(torch.zeros(1).expand(MANY), 0.8, 0.9, 1.0, 2, backend="cpu"), "2147483647 neurons"),
        (lambda: g2g_stack(torch.zeros(1, 1).expand(MANY, 1), [one_layer()], 1, backend="cpu"), "2147483647 samples"),
        (lambda: g2g_stack(torch.zeros(1, 1), [one_layer()], MANY, backend="cpu"), "at most 65536 time steps"),
    ],
)
def test_sizes_beyond_32_bits_are_refused_before_memory_is_taken(call, message):
    with pytest.raises(BackendError, match=message):
        call()


@compiled
def test_a_matrix_of_too_many_blocks_or_places_is_refused_by_their_number(monkeypatch):
    """As one of 3 million neurons on each side would be, whose blocks were numbered in 32 bits, unchecked."""
    mask = BlockMask.full(GroupLayout(8, 8), GroupLayout(8, 8), 33)
    assert plans.refuses(mask, torch.empty(64, 1, 1), "stack") is None
    monkeypatch.setattr(library, "INT32", (-64, 64 * 64 - 1))
    assert plans.refuses(mask, torch.empty(64, 33, 33), "stack") == "serves at most 4095 weights in a layer, not 69696"
    wide = BlockMask.sample(GroupLayout(64, 64), GroupLayout(64, 64), 0.1, 0.0, 33)
    assert "blocks of 64 × 64 weights" in plans.refuses(wide, torch.empty(0, 33, 33), "stack")
    monkeypatch.setattr(library, "INT32", (-64, 63))
    assert "1 weights" not in (plans.refuses(mask, torch.empty(8, 1, 1), "stack") or "")
    assert "places for the neurons" in plans.refuses(mask, torch.empty(8, 1, 1), "stack")
    whole = BlockMask.full(GroupLayout(8, 1), GroupLayout(8, 1), 4)
    with pytest.raises(BackendError, match="serves at most 63 weights in a layer, not 64"):
        g2g_linear(torch.ones(1, 8), torch.ones(4, 4, 4), whole, backend="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: lif(x, 0.9, 1.0, alpha=1e300), r"alpha=1e\+300 must be a number above 0 and at most 1e\+38"),
        (lambda x: lif(x, 0.9, 1.0, alpha=1e-310), "alpha=1e-310 must be .* that a float32 holds"),
        (lambda x: lif(x, math.nan, 1.0), "beta=nan must be a number that a float32 holds"),
        (lambda x: lif(x, 0.9, 1e300), r"threshold=1e\+300 must be"),
        (lambda x: lif_step(x[0], None, 0.9, math.nan), "threshold=nan must be"),
        (lambda x: synaptic(x, math.nan, 0.9, 1.0), "syn_decay=nan must be"),
        (lambda x: lif(x[0], 0.9, 1.0, steps=1.5), "steps=1.5 must be a whole number"),
        (lambda x: lif(x[0], 0.9, 1.0, steps=10**26), "steps=1000000.* must be a whole number of at least 1, at most"),
        (lambda x: GroupLayout(10**12), "size=1000000000000 must be a whole number from 1 to"),
        (lambda x: BlockMask.full(GroupLayout(4, 1), GroupLayout(4, 1), 10**26), "block_size=1000000.* must be"),
    ],
)
def test_arguments_that_no_kernel_can_hold_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2, 4))
