"""g2g_conv2d on every backend against PyTorch's convolution in float64, and the choice between events and that one."""

import math
import random

import pytest
import torch
from helpers import as_near, backends_of, device_of, rms, seeded
from torch.nn import functional as F

from g2g_kernels import BackendError, g2g_conv2d
from g2g_kernels.cpu import library
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.g2g_conv2d import cpu, operator
from g2g_kernels.ops.g2g_conv2d.call import ConvolutionCall
from g2g_kernels.ops.record import Backward

every_backend = pytest.mark.parametrize("backend", backends_of(operator))
needs_kernels = pytest.mark.skipif("cpu" not in backends_of(operator), reason="there are no compiled kernels")


@pytest.fixture
def by_events(monkeypatch):
    """Everything by events, in memory that begins as NaN."""
    monkeypatch.setattr(library, "CONVOLUTION_COST", 0.0)
    monkeypatch.setattr(workspace, "poison", True)


def drawn(seed: int) -> dict:
    """A layer, an input and the gradient of its output: sizes down to 1 × 1, all options, from nothing to everything
    firing."""
    draw, numbers = random.Random(seed), seeded(seed)
    groups = draw.choice([1, 1, 1, 2, 3])
    channels, out = (
        groups * draw.choice(sizes) for sizes in ([1, 2, 3, 5, 16, 17, 33, 64, 70], [1, 2, 7, 16, 20, 64, 100])
    )
    kernel, stride, dilation, padding = (
        (draw.choice(each), draw.choice(each)) for each in ([1, 2, 3, 3, 5], [1, 1, 2, 3], [1, 1, 2, 3], [0, 1, 2, 5])
    )
    size = draw.choice([1, 2, 5, 8, 17, 20]), draw.choice([1, 3, 6, 16, 33])
    reach = [each * (length - 1) + 1 - 2 * zeros for each, length, zeros in zip(dilation, kernel, padding, strict=True)]
    size = max(size[0], reach[0]), max(size[1], reach[1])
    x = torch.rand(draw.choice([1, 2, 9]), channels, *size, generator=numbers)
    x = (x < draw.choice([0, 0.02, 0.1, 0.4, 1])).float()
    if draw.random() < 0.4:
        x *= torch.randn(x.shape, generator=numbers)
    weight = torch.randn(out, channels // groups, *kernel, generator=numbers)
    bias = torch.randn(out, generator=numbers) if draw.random() < 0.6 else None
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    grad = torch.randn(F.conv2d(x, weight, **options).shape, generator=numbers)
    grad *= torch.rand(grad.shape, generator=numbers) < draw.choice([0, 0.1, 1])
    x, grad = (
        each.contiguous(memory_format=draw.choice([torch.channels_last, torch.contiguous_format])) for each in (x, grad)
    )
    return {"x": x, "weight": weight, "bias": bias, "options": options, "grad": grad, "threads": draw.choice([1, 2, 3])}


def results(function, case, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """The output and the gradients of a case."""
    leaves = [case[name] for name in ("x", "weight", "bias") if case[name] is not None]
    leaves = [leaf.detach().to(device, dtype).requires_grad_() for leaf in leaves]
    y = function(*leaves, **case["options"])
    return [y.detach(), *torch.autograd.grad(y, leaves, case["grad"].to(device, dtype))]


def check(case, backend: str) -> None:
    device = device_of(backend)
    found = results(lambda *leaves, **options: g2g_conv2d(*leaves, **options, backend=backend), case, device=device)
    plain, exact = results(F.conv2d, case), results(F.conv2d, case, torch.float64)
    for ours, of_pytorch, wanted in zip(found, plain, exact, strict=True):
        assert ours.shape == wanted.shape
        assert as_near(ours.cpu(), of_pytorch, wanted, 1e-6)  # float32 rounding
    assert found[0].stride() == F.conv2d(case["x"], case["weight"], **case["options"]).stride()


@every_backend
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_layers_against_float64(first, backend, by_events):
    for seed in range(first, first + 10):
        check(drawn(seed), backend)


@pytest.mark.long
@needs_kernels
@pytest.mark.parametrize("first", range(1000, 1600, 50))
def test_six_hundred_random_layers_against_float64(first, by_events):
    for seed in range(first, first + 50):
        case = drawn(seed)
        torch.set_num_threads(case["threads"])
        check(case, "cpu")


@needs_kernels
@pytest.mark.parametrize("rate", [0.0, 0.02, 1.0])
def test_the_way_is_chosen_by_the_rate_and_results_do_not_depend_on_it_or_on_threads(rate, monkeypatch):
    x = (torch.rand(8, 32, 12, 12, generator=seeded(1)) < rate).float()
    grad = torch.randn(8, 48, 12, 12, generator=seeded(2)) * (torch.rand(8, 48, 12, 12, generator=seeded(3)) < rate)
    case = {"x": x, "weight": torch.randn(48, 32, 3, 3, generator=seeded(4)), "bias": None, "grad": grad}
    case["options"] = {"padding": 1}
    dense: list[str] = []
    plain, backward = cpu.plain, torch.ops.aten.convolution_backward

    def noted_backward(*operands):
        dense.extend(["x"] * operands[-1][0] + ["weight"] * operands[-1][1])
        return backward(*operands)

    monkeypatch.setattr(cpu, "plain", lambda call: dense.append("y") or plain(call))
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", noted_backward)
    found = {}
    for cost, expected in ((1.0, rate == 1.0), (0.0, False), (math.inf, True)):
        monkeypatch.setattr(library, "CONVOLUTION_COST", cost)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            dense.clear()
            found[cost, threads] = results(
                lambda *leaves, **options: g2g_conv2d(*leaves, **options, backend="cpu"), case
            )
            assert sorted(dense) == (["weight", "x", "y"] if expected else [])
    assert all(map(torch.equal, found[0.0, 1], found[0.0, 2]))
    for ours, theirs in zip(found[0.0, 1], found[math.inf, 1], strict=True):
        assert rms(ours - theirs) <= 1e-6 * rms(theirs)


@every_backend
def test_an_input_or_a_gradient_of_nan_reaches_what_reads_it(backend, by_events):
    case = drawn(3) | {"options": {"padding": 1}, "weight": torch.randn(6, 4, 3, 3), "bias": None, "threads": 1}
    case["x"], case["grad"] = torch.zeros(2, 4, 8, 8), torch.zeros(2, 6, 8, 8)
    case["x"][0, 1, 2, 3] = case["grad"][1, 5, 7, 0] = math.nan
    found = results(
        lambda *leaves, **options: g2g_conv2d(*leaves, **options, backend=backend), case, device=device_of(backend)
    )
    for actual, exact in zip(found[:2], results(F.conv2d, case, torch.float64)[:2], strict=True):
        assert torch.equal(actual.cpu().isnan(), exact.isnan())


@every_backend
def test_spikes_in_bytes_no_images_and_half_precision(backend):
    weight, spikes = torch.randn(6, 4, 3, 3), torch.rand(2, 4, 8, 8) < 0.2
    device = device_of(backend)
    bytes_, floats = (
        g2g_conv2d(spikes.to(device, dtype), weight.to(device), backend=backend)
        for dtype in (torch.uint8, torch.float32)
    )
    assert torch.equal(bytes_, floats)
    with torch.autocast("cpu", torch.bfloat16):
        assert g2g_conv2d(spikes.float(), weight).dtype == torch.bfloat16
        if backend == "cpu":
            with pytest.raises(BackendError, match="computes in float32, not under autocast"):
                g2g_conv2d(spikes.float(), weight, backend="cpu")
    assert g2g_conv2d(spikes.float()[:0], weight).shape == (0, 6, 6, 6)
    assert g2g_conv2d(spikes.double(), weight.double()).dtype == torch.float64


@needs_kernels
def test_derivatives_that_no_kernel_computes_are_those_of_plain_operations(by_events):
    case = drawn(5)
    x, weight = case["x"].requires_grad_(), case["weight"].requires_grad_()
    twice = []
    for function in (lambda *leaves, **options: g2g_conv2d(*leaves, **options, backend="cpu"), F.conv2d):
        y = function(x, weight, **case["options"])
        (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        twice += [*torch.autograd.grad(grad.square().sum(), [x, weight])]
        twice += [torch.func.vmap(lambda image, f=function: f(image[None], weight, **case["options"]))(x)]
    for ours, theirs in zip(twice[:3], twice[3:], strict=True):
        assert rms(ours.detach() - theirs.detach()) <= 1e-5 * rms(theirs.detach())


@pytest.mark.ci
@needs_kernels
def test_opcheck_and_calls_by_hand(plain_memory):
    case = drawn(7)
    for last in (False, True):
        x = case["x"].permute(0, 2, 3, 1).contiguous() if last else case["x"].contiguous()
        given = ConvolutionCall(x, case["weight"], case["bias"], *case["options"].values(), last)
        leaves = given._replace(x=x.clone().requires_grad_(), weight=case["weight"].clone().requires_grad_())
        cpu.FORWARD.opcheck(leaves, True)
        cpu.FORWARD.backward.opcheck(Backward.of(given, [], [torch.ones_like(cpu.FORWARD(given))]))
        for wrong in (
            {"groups": 0},
            {"stride": (0, 1)},
            {"bias": torch.zeros(1000)},
            {"x": x[:, :0]},
            {"weight": x[0]},
        ):
            with pytest.raises(ValueError, match=r"cannot be|does not fit into|must be"):
                cpu.FORWARD.check(given._replace(**wrong))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8, 8)}, r"x has shape \(4, 8, 8\) and weight"), ({"weight": torch.zeros(6, 4)}, "weight"),
        ({"x": torch.zeros(1, 5, 8, 8)}, "x has 5 channels, and groups=1"), ({"groups": 0}, "groups=0 must be"),
        ({"stride": 0}, "stride=0 must be"), ({"stride": (1, 2, 3)}, "stride=.* must be one number or two"),
        ({"padding": -1}, "padding=-1 must be"), ({"dilation": 1.5}, "dilation"), ({"bias": torch.ones(4)}, "bias has"),
        ({"x": torch.zeros(1, 4, 2, 8)}, "are smaller than the kernel, 3 × 3"), ({"x": "text"}, "x must be a tensor"),
        ({"backend": "mkl"}, "backend='mkl' is not a backend"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        g2g_conv2d(**{"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(6, 4, 3, 3)} | change)


def test_an_option_may_be_a_tensor_that_changes(monkeypatch):
    """The kernels' arguments are kept by their sizes, as ints."""
    monkeypatch.setattr(library, "CONVOLUTION_COST", 0.0)
    x, weight = (torch.rand(*shape, generator=seeded(0)) for shape in ((1, 2, 9, 9), (3, 2, 3, 3)))
    stride = torch.tensor(1)
    for number in (1, 2):
        stride.fill_(number)
        torch.testing.assert_close(g2g_conv2d(x, weight, None, stride), F.conv2d(x, weight, None, number))
