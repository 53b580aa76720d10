"""g2g_linear on every backend against the dense product in float64."""

import helpers
import linear_cases
import pytest
import torch
from covering import drawn_cases
from helpers import (
    MASK_CASES,
    ErrorRatios,
    MaskCase,
    as_near,
    backends_of,
    changed,
    dense_by_loop,
    device_of,
    lif_layer,
    packed_randn,
    rms,
    seeded,
)
from linear_cases import backend_result, dense_result, inputs

from g2g_kernels import BackendError, g2g_linear, g2g_stack, lif
from g2g_kernels.ops.g2g_linear import operator

every_backend = pytest.mark.parametrize("backend", backends_of(operator))


@every_backend
def test_errors_are_at_most_1_5_times_those_of_plain_pytorch(backend):
    """And small. 6,000 samples are summed in a weight gradient, as T·B of them are in training."""
    ratios = ErrorRatios()
    cases = drawn_cases({"mask": MASK_CASES, "samples": (37, 6000), "kind": ("dense", "spikes"), "seed": (0, 1)})
    for case, (of, samples, kind, seed) in ((name, case.values()) for name, case in cases.items()):
        print(case)
        mask = MASK_CASES[of].mask(seed=seed)
        x, values, bias = inputs(mask, samples)
        if kind == "spikes":
            x = (x > 1.3).float()
        grad_output = torch.randn(samples, mask.shape[0], generator=seeded(4 + seed))
        exact = dense_result(mask, x, values, bias, grad_output)
        plain = backend_result(mask, x, values, bias, grad_output, "torch")
        for name, actual in backend_result(mask, x, values, bias, grad_output, backend).items():
            assert as_near(actual, plain[name], exact[name], 2e-6), name  # float32 rounding of sums
            ratios.add(name, actual, plain[name], exact[name])
    ratios.check(len(cases))


@pytest.mark.parametrize("batch", [(), (1,), (6,), (3, 5), (2, 1, 3)], ids=str)
@every_backend
def test_any_number_of_leading_dimensions(batch, backend):
    mask = MASK_CASES["ten outputs"].mask()
    x, values, bias = inputs(mask, *batch)
    grad_output = torch.randn(*batch, mask.shape[0], generator=seeded(4))
    exact = dense_result(mask, x, values, bias, grad_output)
    for name, actual in backend_result(mask, x, values, bias, grad_output, backend).items():
        assert actual.shape == exact[name].shape, name
        assert rms(actual - exact[name]) <= 1e-6 * rms(exact[name]), name  # float32 rounding


@pytest.mark.parametrize("backend", [None, *backends_of(operator)])
def test_spikes_in_bytes_are_those_in_floats(backend):
    mask = MASK_CASES["784 to 2048, an eighth"].mask()
    device = device_of(backend)
    x, values, bias = (tensor.to(device) for tensor in inputs(mask, 6, 9))
    grad_output = torch.randn(6, 9, mask.shape[0], generator=seeded(4)).to(device)
    results = []
    for dtype in (torch.uint8, torch.float32):
        leaves = [values.detach().requires_grad_(), bias.detach().requires_grad_()]
        output = g2g_linear((x > 0.8).to(dtype), leaves[0], mask.to(device), leaves[1], backend=backend)
        output.backward(grad_output)
        results.append([output, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", [None, *backends_of(operator)])
def test_no_samples(backend):
    mask = MASK_CASES["ten outputs"].mask()
    x, values, bias = inputs(mask, 0)
    with helpers.skip_where_refused():
        results = backend_result(mask, x, values, bias, torch.zeros(0, mask.shape[0]), backend)
    assert results["output"].shape == (0, mask.shape[0])
    assert results["values.grad"].shape == values.shape
    assert not results["values.grad"].any()
    assert not results["bias.grad"].any()


@every_backend
def test_input_and_gradient_need_not_be_contiguous(backend):
    mask = MASK_CASES["784 to 2048, an eighth"].mask()
    x, values, bias = inputs(mask, 6, 9)
    grad_output = torch.randn(6, 9, mask.shape[0], generator=seeded(4))
    strided = {
        "time and batch exchanged": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "features first": lambda tensor: tensor.movedim(-1, 0).contiguous().movedim(0, -1),
        "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
        "one element": lambda tensor: torch.ones(()).expand_as(tensor),  # the gradient of a sum
    }
    for how, rearranged in strided.items():
        given = rearranged(x), values, bias, rearranged(grad_output)
        assert not given[0].is_contiguous()
        contiguous = backend_result(mask, *(tensor.contiguous() for tensor in given), backend)
        for name, actual in backend_result(mask, *given, backend).items():
            # a backend may choose another order of summation for another layout: float32 rounding
            assert rms(actual - contiguous[name]) <= 1e-6 * rms(contiguous[name]), f"{name}, {how}"


@pytest.mark.parametrize("needed", ["x", "values", "bias"])
@every_backend
def test_one_gradient_alone(needed, backend):
    linear_cases.check_one_gradient_alone(MASK_CASES["ragged groups of 64"].mask(), needed, backend)


@every_backend
def test_rows_and_columns_without_units(backend):
    linear_cases.check_rows_and_columns_without_units(3, backend)


@every_backend
def test_a_mask_without_any_unit(backend):
    linear_cases.check_a_mask_without_any_unit(MASK_CASES["ten outputs"].mask(p_inter=0.0, p_intra=0.0), backend)


@every_backend
def test_a_mask_is_read_at_each_call(backend):
    """Other units and other random groups come into the same buffers; nothing of the old mask may be remembered."""
    case = MaskCase(24, 32, 4, "random", "random", 3)
    saved, mask = case.mask(p_inter=1 / 3, seed=1), case.mask(p_inter=1 / 3, seed=2)
    assert saved.num_units == mask.num_units
    x, values = inputs(mask, 5)[0], packed_randn(mask, 2)
    device, absent = device_of(backend), (~saved.present()).nonzero()[:1]
    for change in (
        lambda: None,
        lambda: mask.load_state_dict(saved.state_dict()),
        lambda: mask.relabel_(torch.tensor([0]), absent[:, 0], absent[:, 1]),
    ):
        change()
        expected = x.double() @ dense_by_loop(mask, values).double().T
        actual = g2g_linear(x.to(device), values.to(device), mask.to(device), backend=backend).cpu()
        assert rms(actual - expected) <= 1e-6 * rms(expected)  # float32 rounding
        mask.to("cpu")


@every_backend
def test_autocast_to_bfloat16(backend):
    linear_cases.check_autocast([case.mask() for case in MASK_CASES.values()], 37, torch.bfloat16, backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 10)}, r"x has shape \(4, 10\), its last dimension must be the mask's 43 inputs"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        ({"values": torch.zeros(3, 3, 3)}, r"values have shape \(3, 3, 3\), this mask's packed weights"),
        ({"bias": torch.zeros(43)}, r"bias has shape \(43,\), the mask has 10 outputs"),
        ({"bias": torch.zeros(1)}, r"bias has shape \(1,\), the mask has 10 outputs"),
        ({"backend": "mkl"}, "backend='mkl' is not a backend; choose one of auto, triton, cpu, torch"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    mask = MASK_CASES["ten outputs"].mask()
    x, values, bias = inputs(mask, 4)
    with pytest.raises(ValueError, match=message):
        g2g_linear(**{"x": x, "values": values, "mask": mask, "bias": bias} | change)


WRONG = (
    torch.zeros(3, 3, 3, 13), torch.zeros(0), torch.zeros(2, 11), torch.zeros(4).long(), torch.zeros(4).cfloat(),
    torch.zeros(4).to_sparse(), torch.zeros(1).expand(10**12), None, "text", [1.0, 2.0],
)  # fmt: skip


@pytest.mark.parametrize("backend", backends_of(operator))
@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_an_argument_of_a_wrong_kind_is_named(wrong, backend):
    mask, own = MASK_CASES["ten outputs"].mask(), {"beta": torch.tensor(0.9), "threshold": torch.tensor(1.0)}
    layer, x = lif_layer(packed_randn(mask, 0), mask, torch.zeros(10), **own), torch.ones(4, 43)
    (feed,) = layer.connections
    linear = {"x": x, "values": feed.values, "mask": mask, "bias": feed.bias}
    neurons = {"current": torch.zeros(3, 5), **own}
    calls = [
        *((name, lambda name=name: g2g_linear(**{**linear, name: wrong}, backend=backend)) for name in linear),
        *((name, lambda name=name: lif(**{**neurons, name: wrong}, backend=backend)) for name in neurons),
        ("x|receives", lambda: g2g_stack(wrong, [layer], 3, backend=backend)),
    ]
    for name in ("values", "mask", "bias", *own):
        spoiled = changed(layer, **{name: wrong})
        calls.append((name, lambda spoiled=spoiled: g2g_stack(x, [spoiled], 3, backend=backend)))
    fits = {"bias": wrong is None, "current": isinstance(wrong, torch.Tensor) and wrong.dim() > 1}
    for name, call in calls:
        if not fits.get(name):
            with pytest.raises((ValueError, BackendError), match=rf"\b({name})\b"):
                call()
