"""g2g_linear's Triton kernels: on a GPU where there is one, else small sizes in Triton's interpreter on the CPU.
bfloat16 is tested on a GPU only: the interpreter's bfloat16 arithmetic is wrong."""

import contextlib
import types

import linear_cases
import pytest
import torch
from helpers import ErrorRatios, MaskCase, dense_by_loop, device_of, packed_randn, rms, seeded
from linear_cases import backend_result, dense_result, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from g2g_kernels import BackendError, BlockMask, GroupLayout, g2g_linear
from g2g_kernels.mask.sides import Side
from g2g_kernels.triton import runtime

if runtime.unavailable() is None:
    import triton_interpreter

    from g2g_kernels.ops.g2g_linear import tiles, triton

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

#: sparse enough for the units' own kernels, whole and ragged, in and out of group order, and single weights
CASES = {
    "units of 16, ragged": MaskCase(82, 101, 2, "interleaved", "index", 16),
    "units of 16, whole": MaskCase(96, 128, 2, "index", "index", 16),
    "units of 32, ragged": MaskCase(108, 140, 3, "index", "random", 32),
    "units of 32, whole": MaskCase(128, 192, 2, "interleaved", "index", 32),
    "units of 64, ragged": MaskCase(150, 290, 2, "random", "interleaved", 64),
    "units of 64, whole": MaskCase(256, 192, 1, "index", "index", 64),
    "two outputs a group": MaskCase(10, 300, 4, "index", "interleaved", 64),
    "units of 128": MaskCase(256, 300, 1, "index", "index", 128),
    "single weights": MaskCase(13, 29, 3, "random", "interleaved", 1),
}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if not runtime.interpreted() else [])
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def sparse_mask(case: MaskCase, seed: int = 0) -> BlockMask:
    """Some units of every case, in some block rows none."""
    return case.mask(p_inter=0.15, p_intra=0.3, seed=seed)


@pytest.fixture(autouse=True)
def by_units(monkeypatch):
    """Dense weights for single weights; units for all others, whose products are too small to say what is faster."""
    monkeypatch.setattr(triton, "dense_pays", lambda units, *_: units.rows.width == units.cols.width == 1)


def test_the_cases_are_what_they_should_be():
    masks = {name: sparse_mask(case) for name, case in CASES.items()}
    assert all(mask.num_units > 0 for mask in masks.values())
    for pointer in ("row_ptr", "col_ptr"):  # of rows and of columns without units
        assert any((getattr(mask, pointer).diff() == 0).any() for mask in masks.values())


@pytest.mark.parametrize("name", ["single weights", "units of 16, ragged"])
def test_a_wider_output_than_factors_is_not_rounded_to_them(name):
    """That of a held current, by dense weights and by units: a rounding error would add up over the steps."""
    device = device_of("triton")
    mask = sparse_mask(CASES[name]).to(device)
    x, values, bias = (tensor.to(device) for tensor in inputs(mask, 7))
    values = values.half()
    y = triton.product(x.half(), values, triton.units_of(mask.tensors(), values), bias, torch.float32)
    exact = x.half().double() @ mask.unpack(values).double().T + bias.double()
    assert rms(y.double() - exact) < 1e-6 * rms(exact)


class NeverSorting(TorchDispatchMode):
    """Raises for an operation that sorts its indices on a GPU under deterministic algorithms."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.name().startswith(("aten::index_copy", "aten::index_put", "aten::sort")), function
        return function(*args, **(kwargs or {}))


@every_case
def test_the_dense_weight_is_that_of_the_mask_and_sorts_nothing(case):
    mask = sparse_mask(case).to(device_of("triton"))
    values = packed_randn(mask, 3).to(device_of("triton"))
    units = triton.units_of(mask.tensors(), values)
    with NeverSorting():
        weight = triton.dense_weight(values, units)
    assert torch.equal(weight, mask.unpack(values))


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["dense", "spikes"])
@every_dtype
def test_errors_are_at_most_1_5_times_those_of_plain_pytorch(dtype, kind):
    """Over all masks, with odd numbers of samples that take tiles of 16 or of 64 in turn."""
    ratios = ErrorRatios()
    for number, case in enumerate(CASES.values()):
        mask, samples = sparse_mask(case), (37, 7)[(number + (kind == "spikes")) % 2]
        x, values, bias = (tensor.to(dtype) for tensor in inputs(mask, samples))
        if kind == "spikes":
            x = (x > 0.8).to(dtype)
        grad_output = torch.randn(samples, mask.shape[0], generator=seeded(4)).to(dtype)
        exact = dense_result(mask, x, values, bias, grad_output)
        plain = backend_result(mask, x, values, bias, grad_output, "torch")
        actual = backend_result(mask, x, values, bias, grad_output, "triton")
        for name, tensor in actual.items():
            ratios.add(name, tensor, plain[name], exact[name])
        assert not actual["values.grad"][~mask.valid()].any(), "padding got a gradient"
    ratios.check(cases=len(CASES))


@pytest.fixture
def as_on_a_card():
    """Products as a card adds them, in the interpreter too."""
    with triton_interpreter.tensor_core_products() if runtime.interpreted() else contextlib.nullcontext():
        yield


@pytest.mark.ci
@pytest.mark.parametrize(("samples", "parts", "rate"), [(2200, 2, None), (6400, 1, 0.1)])
def test_sums_over_many_samples(samples, parts, rate, as_on_a_card, monkeypatch):
    """Parts of a weight gradient are added by a second launch; no chain of additions is as long as a part."""
    monkeypatch.setattr(tiles, "_PROGRAMS", parts)
    mask, ratios = one_unit(), ErrorRatios()
    x, values, bias = inputs(mask, samples)
    if rate:  # of spikes
        x = (torch.rand(x.shape, generator=seeded(5)) < rate).float()
    grad_output = torch.randn(samples, 16, generator=seeded(4))
    exact = dense_result(mask, x, values, bias, grad_output)
    plain = backend_result(mask, x, values, bias, grad_output, "torch")
    actual = backend_result(mask, x, values, bias, grad_output, "triton")
    for name, tensor in actual.items():
        ratios.add(name, tensor, plain[name], exact[name])
    ratios.check(cases=1)
    if parts > 1:
        again = backend_result(mask, x, values, bias, grad_output, "triton")
        torch.testing.assert_close(again, actual, rtol=0, atol=0)


@every_case
def test_spikes_in_bytes_are_those_in_floats(case):
    mask = sparse_mask(case).to(device_of("triton"))
    x, values, bias = (tensor.to(device_of("triton")) for tensor in inputs(mask, 21))
    x = x > 0.8
    both = (x.to(dtype) for dtype in (torch.uint8, torch.float32))
    as_bytes, as_floats = (g2g_linear(each, values, mask, bias, backend="triton") for each in both)
    # tiles of bytes are deeper than those of floats, so sums are rounded elsewhere
    assert rms(as_bytes - as_floats) <= 1e-6 * rms(as_floats)


def test_long_sums_of_spikes(as_on_a_card):
    """A neuron with 2048 inputs, of which 5 % fire: tensor cores would draw one sum over all of them towards zero."""
    first_half = torch.zeros(32, dtype=torch.int64), torch.arange(32)
    mask = BlockMask(GroupLayout(128, 1), GroupLayout(2048, 1), *first_half, 64)
    ratios = ErrorRatios()
    _, values, bias = inputs(mask, 1)
    x = (torch.rand(40, 2048, generator=seeded(1)) < 0.05).float()
    exact = x.double() @ dense_by_loop(mask, values).double().T + bias.double()
    device = device_of("triton")
    plain = g2g_linear(x, values, mask, bias, backend="torch")
    tensors = (tensor.to(device) for tensor in (x.to(torch.uint8), values))
    ratios.add("output", g2g_linear(*tensors, mask.to(device), bias.to(device), backend="triton").cpu(), plain, exact)
    ratios.check(cases=1)


#: of NumPy in the interpreter
beyond_numbers = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def one_unit() -> BlockMask:
    layout = GroupLayout(16, 1)
    return BlockMask(layout, layout, torch.tensor([0]), torch.tensor([0]), 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["bytes", "floats"])
def test_one_spike_gives_its_weights_to_the_last_bit(dtype):
    """Of any size: the largest numbers, those whose parts are below the least normal bfloat16, and ordinary ones."""
    device = device_of("triton")
    exponents = torch.linspace(-100, 127, 256, dtype=torch.float64).floor()
    weight = (2**exponents * (1 + torch.rand(256, generator=seeded(0), dtype=torch.float64))).float().view(16, 16)
    weight[3, 5], weight[7, 2] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    x = torch.eye(16, dtype=dtype, device=device)
    y = g2g_linear(x, weight[None].to(device), one_unit().to(device), backend="triton")
    assert torch.equal(y.cpu(), weight.T)


@beyond_numbers
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["bytes", "floats"])
def test_numbers_that_are_not_finite_are_those_of_plain_pytorch(dtype):
    """Infinite weights, inputs and gradients: ∞ where float32 has ∞, and NaN where it has NaN."""
    mask, infinite = one_unit(), float("inf")
    x = torch.rand(8, 16, generator=seeded(1)).mul(3).floor().clamp(0, 1)
    values = torch.randn(1, 16, 16, generator=seeded(2))
    grad_output = torch.randn(8, 16, generator=seeded(3))
    values[0, 2, 3], values[0, 2, 4], values[0, 5, 3], values[0, 6, 0] = infinite, -infinite, infinite, float("nan")
    grad_output[1, 4], grad_output[2, 6], grad_output[3, 6] = infinite, -infinite, infinite
    if dtype == torch.float32:
        x[0, 8], x[1, 9], x[2, 9] = infinite, -infinite, infinite
    results = []
    for backend in ("torch", "triton"):
        device = device_of(backend)
        mask.to(device)
        leaves = x.to(device, dtype), values.to(device).requires_grad_()
        if dtype == torch.float32:
            leaves[0].requires_grad_()
        y = g2g_linear(*leaves, mask, backend=backend)
        y.backward(grad_output.to(device))
        results.append([tensor.detach().cpu() for tensor in (y, *(leaf.grad for leaf in leaves if leaf.requires_grad))])
    for plain, actual in zip(*results, strict=True):
        assert plain.isinf().any()
        assert plain.isnan().any()
        torch.testing.assert_close(actual, plain, equal_nan=True)  # ∞ and NaN in the same places


@pytest.mark.parametrize("needed", ["x", "values", "bias"])
def test_one_gradient_alone(needed):
    linear_cases.check_one_gradient_alone(sparse_mask(CASES["units of 32, ragged"]), needed, "triton")


@pytest.mark.parametrize("block_size", [2, 16])
def test_rows_and_columns_without_units(block_size):
    linear_cases.check_rows_and_columns_without_units(block_size, "triton")


def test_a_mask_without_any_unit():
    linear_cases.check_a_mask_without_any_unit(CASES["units of 16, ragged"].mask(p_inter=0.0, p_intra=0.0), "triton")


@pytest.mark.parametrize("batch", [(), (0,), (3, 5)], ids=str)
def test_any_number_of_leading_dimensions_and_no_bias(batch):
    device = device_of("triton")
    mask = sparse_mask(CASES["units of 16, whole"])
    x, values, _ = inputs(mask, *batch)
    expected = x.double() @ dense_by_loop(mask, values).double().T
    values = values.to(device).requires_grad_()
    actual = g2g_linear(x.to(device), values, mask.to(device), backend="triton")
    actual.sum().backward()
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.detach().double().cpu(), expected, rtol=0, atol=1e-5)  # float32 rounding
    assert values.grad.any() == (0 not in batch)


def test_units_relabelled_in_place_are_seen():
    """The transposed index too; values stay where they are."""
    device = device_of("triton")
    mask = sparse_mask(CASES["units of 16, whole"])
    x, values, bias = inputs(mask, 6)
    present = mask.flat_unit().tolist()
    absent = next(unit for unit in range(mask.grid[0] * mask.grid[1]) if unit not in present)
    mask.to(device).relabel_(*(torch.tensor([n], device=device) for n in (1, *divmod(absent, mask.grid[1]))))
    grad_output = torch.randn(6, mask.shape[0], generator=seeded(4))
    results = backend_result(mask, x, values, bias, grad_output, "triton")
    exact = dense_result(mask, x, values, bias, grad_output)
    for name, actual in results.items():
        assert rms(actual - exact[name]) <= 1e-6 * rms(exact[name]), name  # float32 rounding


def test_autocast_to_float16():
    linear_cases.check_autocast([sparse_mask(case) for case in CASES.values()], 9, torch.float16, "triton")


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (torch.float64, "needs float32, float16 or bfloat16 tensors, not torch.float64"),
        (torch.float16, r"needs x and values of one dtype \(or autocast\), not torch.float16"),
        pytest.param("meta", f"needs tensors on {device_of('triton')}, not on meta", marks=pytest.mark.driver),
    ],
    ids=["double", "half", "device"],
)
def test_what_the_kernels_cannot_serve_is_refused_with_the_reason(to, reason):
    device = device_of("triton")
    mask = sparse_mask(CASES["units of 16, whole"]).to(device)
    x, values, bias = (tensor.to(device) for tensor in inputs(mask, 3))
    with pytest.raises(BackendError, match=f"cannot serve this call of g2g_linear: triton: {reason}"):
        g2g_linear(x.to(to), values, mask, bias, backend="triton")


def test_what_offsets_of_32_bits_and_grids_do_not_reach_is_refused():
    x, small = torch.zeros(1, device=device_of("triton")), (1, 64, 64)
    for rows, cols, reason in (
        (((1 << 18) - 1, 64, 1 << 24), small, None),
        ((1 << 18, 64, 1 << 24), small, "neurons × samples per step, 128 samples at least"),  # 128 · 2²⁴
        (small, (1 << 18, 64, 1 << 24), "neurons × samples per step, 128 samples at least"),
        (((1 << 20) + 1, 2, 1 << 21), small, "at most 2²⁰ rows"),
        ((1, 1 << 14, 1 << 14), (1, 1 << 14, 1 << 14), "units of 2²⁸ weights"),
    ):
        found = triton.refuses(x, x, types.SimpleNamespace(rows=Side(*rows), cols=Side(*cols)), None)
        assert found is None if reason is None else reason in found
