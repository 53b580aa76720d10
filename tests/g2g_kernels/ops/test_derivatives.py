"""Derivatives beyond the first: those of ``g2g_linear`` against float64, those of neurons refused by name."""

import warnings

import pytest
import torch
from helpers import MASK_CASES, backends_of, packed_randn, row_with, seeded
from torch.autograd import forward_ad

from g2g_kernels import BackendError, Neurons, SpikingLayer, adlif, g2g_linear, g2g_stack, lif, lif_step, synaptic
from g2g_kernels.ops import g2g_linear as linear_module
from g2g_kernels.ops import neurons as neurons_module

CASES = ["ten outputs", "single weights", "groups smaller than a unit"]
# PyTorch's own: what vmap and forward mode import, and how they loop
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:There is a performance drop")


def linear_case(case, dtype):
    mask = MASK_CASES[case].mask()
    draw = seeded(1)
    tensors = (
        torch.randn(4, mask.shape[1], generator=draw),
        packed_randn(mask, 2),
        torch.randn(mask.shape[0], generator=draw),
    )
    return mask, [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")  # gradcheck's own, PyTorch 2.6
def test_the_oracle_is_differentiable_twice_and_in_forward_mode():
    mask, tensors = linear_case("single weights", torch.float64)

    def function(x, values, bias):
        return g2g_linear(x, values, mask, bias, backend="torch")

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def derivatives(backend, case, dtype):
    """Every kind of derivative and of ``vmap``, by name."""
    mask, tensors = linear_case(case, dtype)
    weight = torch.linspace(-1, 1, mask.shape[0], dtype=dtype)
    tangents = tuple(torch.linspace(1, -1, t.numel(), dtype=dtype).view(t.shape) for t in tensors)

    def function(x, values, bias):
        return g2g_linear(x, values, mask, bias, backend=backend)

    def loss(x, values, bias):
        return (function(x, values, bias).tanh() * weight).sum()

    first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), tensors, create_graph=True)
    third = torch.autograd.grad(sum(t.square().sum() for t in second), tensors)
    results = {"first": flat(first), "second": flat(second), "third": flat(third)}
    primals = tuple(t.detach() for t in tensors)
    results["jvp"] = torch.func.jvp(function, primals, tangents)[1]
    for number in range(3):

        def of_one(tensor, number=number):
            return function(*primals[:number], tensor, *primals[number + 1 :])

        results[f"jvp of {number}"] = torch.func.jvp(of_one, (primals[number],), (tangents[number],))[1]
    results["jvp by two backward passes"] = torch.autograd.functional.jvp(function, primals, tangents)[1]
    gradients = torch.func.grad(loss, (0, 1, 2))
    results["forward over reverse"] = flat(torch.func.jvp(gradients, primals, tangents)[1])
    with forward_ad.dual_level():
        x = forward_ad.make_dual(tensors[0], tangents[0])
        (to_values,) = torch.autograd.grad(loss(x, *tensors[1:]), tensors[1])  # without create_graph
        results["dual"] = forward_ad.unpack_dual(to_values).tangent
    many = [torch.stack([t, -0.5 * t, t.flip(0) * mask.valid() if t.dim() == 3 else 2 * t]) for t in primals]
    for batched in ((0,), (1,), (2,), (0, 1, 2), (0, 2)):
        dims = tuple(0 if number in batched else None for number in range(3))
        arguments = [many[number] if number in batched else primals[number] for number in range(3)]
        results[f"vmap over {batched}"] = torch.func.vmap(function, dims)(*arguments)
        results[f"gradients under vmap over {batched}"] = flat(torch.func.vmap(gradients, dims)(*arguments))
    return {name: result.detach() for name, result in results.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [name for name in backends_of(linear_module.operator) if name != "torch"])
def test_every_derivative_is_that_of_float64(backend, case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual, exact = derivatives(backend, case, torch.float32), derivatives("torch", case, torch.float64)
    for name, expected in exact.items():
        error = (actual[name].double() - expected).norm() / expected.norm()
        assert expected.norm() > 0
        assert error < 2e-6, f"{name}: {error:.1e}"


def test_weights_in_the_padding_of_units_count_for_nothing_in_any_derivative():
    mask, tensors = linear_case("ten outputs", torch.float32)
    padding = ~mask.valid()
    assert padding.any()
    for backend in backends_of(linear_module.operator):
        gradient = torch.autograd.grad(
            g2g_linear(tensors[0], tensors[1], mask, backend=backend).tanh().sum(), tensors[:2], create_graph=True
        )
        (second,) = torch.autograd.grad(flat(gradient).square().sum(), tensors[1])
        assert not gradient[1][padding].any()
        assert not second[padding].any()


@pytest.mark.parametrize("backend", backends_of(linear_module.operator))
@pytest.mark.parametrize("change", ["relabel_", "load_state_dict"])
def test_a_mask_that_changed_since_the_forward_pass_is_refused(backend, change):
    mask, (x, values, bias) = linear_case("single weights", torch.float32)
    y = g2g_linear(x, values, mask, bias, backend=backend)
    if change == "relabel_":
        mask.relabel_(torch.tensor([0]), mask.unit_row[1:2].clone(), mask.unit_col[:1].clone())
    else:
        mask.load_state_dict({"wiring": row_with(mask, unit_row=lambda t: t.flip(0), unit_col=lambda t: t.flip(0))})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", backends_of(linear_module.operator))
def test_a_pass_keeps_the_units_that_it_ran_with_where_a_mask_gets_another_number(backend):
    mask, (x, values, _) = linear_case("single weights", torch.float32)
    (expected,) = torch.autograd.grad(g2g_linear(x, values, mask, backend=backend).sum(), values)
    y = g2g_linear(x, values, mask, backend=backend)
    before = mask.num_units
    mask.load_state_dict(MASK_CASES["single weights"].mask(p_inter=0.8).state_dict())
    assert mask.num_units != before
    assert torch.equal(torch.autograd.grad(y.sum(), values)[0], expected)


# --- what neurons do not have -------------------------------------------------------------------------------------


def stack_counts(backend):
    mask = MASK_CASES["ten outputs"].mask()
    values = packed_randn(mask, 0).requires_grad_()
    layer = SpikingLayer(values, mask, None, Neurons("lif", (torch.tensor(0.9), torch.tensor(0.3))))
    return lambda x: g2g_stack(x, [layer], backend=backend).counts


NEURONS = {
    "lif": lambda backend: lambda x: lif(x, torch.tensor(0.9, requires_grad=True), 0.3, backend=backend),
    "synaptic": lambda backend: lambda x: synaptic(x, 0.5, torch.tensor(0.9, requires_grad=True), 0.3, backend=backend),
    "adlif": lambda backend: (
        lambda x: adlif(x, 0.9, 0.9, 0.1, torch.tensor(0.1, requires_grad=True), 0.3, backend=backend)
    ),
    "g2g_stack": stack_counts,
}


@pytest.mark.parametrize("backend", backends_of(neurons_module.operator))
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_refuse_what_they_do_not_have(backend, name):
    """840b5ea gave zeros on the CPU backend."""
    function = NEURONS[name](backend)
    x = torch.randn(5, 2, 43, generator=seeded(0)).requires_grad_()
    try:
        y = function(x)
    except BackendError as reason:
        pytest.skip(str(reason))
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert gradient.any()
    with pytest.raises(NotImplementedError, match="have no second derivative; lif_step"):
        gradient.square().sum().backward()
    for second in (torch.autograd.functional.hessian, torch.autograd.functional.jvp):
        arguments = (x.detach(), x.detach()) if second is torch.autograd.functional.jvp else (x.detach(),)
        with pytest.raises(NotImplementedError, match="have no second derivative"):
            second((lambda x: function(x).sum()) if len(arguments) == 1 else function, *arguments)
    with pytest.raises(NotImplementedError, match="have no forward-mode derivative"):
        torch.func.jvp(function, (x.detach(),), (x.detach(),))


def test_the_remedy_differentiates_twice_and_in_forward_mode():
    beta, theta = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.5))
    current = torch.rand(4, 3, generator=seeded(0), dtype=torch.float64).requires_grad_()

    def smooth(current, beta, theta):
        """The membranes, which are smooth between spikes, and the spikes, by their surrogates' values."""
        membrane, total = None, 0.0
        for current_t in current:
            spikes, membrane = lif_step(current_t, membrane, beta, theta, "none")
            total = total + membrane * spikes.detach()
        return total

    assert torch.autograd.gradgradcheck(smooth, (current, beta, theta))

    def spikes(current):
        return lif_step(current, None, beta, theta)[0]

    (gradient,) = torch.autograd.grad(spikes(current[0]).sum(), current, create_graph=True)
    assert gradient.square().sum().requires_grad
    tangent = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        forward = torch.func.jvp(spikes, (current[0].detach(),), (tangent,))[1]
    torch.testing.assert_close(forward, gradient[0].detach())


def test_inside_what_is_compiled_a_tangent_is_right_or_refused(plain_memory):
    mask, (x, values, bias) = linear_case("ten outputs", torch.float32)
    x = x.detach()

    def linear(x):
        return g2g_linear(x, values, mask, bias)

    expected = torch.func.jvp(linear, (x,), (x,))[1]
    compiled = torch.compile(lambda x: torch.func.jvp(linear, (x,), (x,))[1], backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled = torch.compile(lambda x: torch.func.jvp(NEURONS["lif"](None), (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        compiled(x)
