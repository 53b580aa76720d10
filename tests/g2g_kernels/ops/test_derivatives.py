"""Derivatives beyond the first: against float64: those of ``g2g_linear``, and those of neurons."""

import warnings

import pytest
import torch
from helpers import MASK_CASES, MaskCase, backends_of, chained, packed_randn, seeded, skip_where_refused, unread_padding
from linear_cases import inputs
from torch.autograd import forward_ad

from g2g_kernels import Neurons, g2g_linear, g2g_stack, lif_step, neurons, neurons_step
from g2g_kernels.ops import g2g_linear as linear_module
from g2g_kernels.ops import neurons as neurons_module

CASES = ["ten outputs", "single weights", "groups smaller than a unit"]
# PyTorch's own: what vmap and forward mode import, and how they loop
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:There is a performance drop")


def linear_case(case, dtype):
    mask = MASK_CASES[case].mask()
    draw = seeded(1)
    x, bias = (torch.randn(*shape, generator=draw) for shape in ((4, mask.shape[1]), mask.shape[:1]))
    tensors = x, unread_padding(mask, packed_randn(mask, 2)), bias
    return mask, [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")  # gradcheck's own, PyTorch 2.6
@pytest.mark.parametrize(
    "case", [(6, 4, 2, "index", "index", 2), (5, 7, 3, "random", "interleaved", 2), (4, 3, 1, "index", "index", 1)]
)
def test_the_oracle_is_differentiable_twice_and_in_forward_mode(case):
    """Of whole and clipped units, and of single weights."""
    mask = MaskCase(*case).mask()
    tensors = [tensor.nan_to_num().double().requires_grad_() for tensor in inputs(mask, 3)]

    def function(x, values, bias):
        return g2g_linear(x, values, mask, bias)

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
    many = [torch.stack([t, -0.5 * t, 2 * t]) for t in primals]
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


@pytest.mark.parametrize("backend", backends_of(linear_module.operator))
def test_a_pass_keeps_the_units_that_it_ran_with_where_a_mask_gets_another_number(backend):
    mask, (x, values, _) = linear_case("single weights", torch.float32)
    (expected,) = torch.autograd.grad(g2g_linear(x, values, mask, backend=backend).sum(), values)
    y = g2g_linear(x, values, mask, backend=backend)
    before = mask.num_units
    mask.load_state_dict(MASK_CASES["single weights"].mask(p_inter=0.8).state_dict())
    assert mask.num_units != before
    assert torch.equal(torch.autograd.grad(y.sum(), values)[0], expected)


STACK_MASK = MASK_CASES["ten outputs"].mask()
STACK_VALUES = packed_randn(STACK_MASK, 0)
PARAMETERS = {"lif": (0.9, 0.3), "synaptic": (0.5, 0.9, 0.3), "adlif": (0.9, 0.9, 0.1, 0.1, 0.3)}


def operator_of(name, backend):
    """x → spikes, or the counts of a stack."""
    if name == "g2g_stack":
        layer = chained(0, STACK_VALUES.clone().requires_grad_(), STACK_MASK, None, Neurons("lif", PARAMETERS["lif"]))
        return lambda x: g2g_stack(x, [layer], backend=backend).counts
    decay, *others = PARAMETERS[name]
    return lambda x: neurons(x, Neurons(name, (torch.tensor(decay, requires_grad=True), *others)), backend=backend)


def steps_of(name):
    """The same by a loop over single steps."""
    model = "lif" if name == "g2g_stack" else name

    def run(x, decay=PARAMETERS[model][0]):
        if name == "g2g_stack":
            x = x @ STACK_MASK.unpack(STACK_VALUES.to(x.dtype)).T
        states, spikes = None, []
        for current in x:
            spikes_t, states = neurons_step(current, states, Neurons(model, (decay, *PARAMETERS[model][1:])))
            spikes.append(spikes_t)
        return torch.stack(spikes).sum(0) if name == "g2g_stack" else torch.stack(spikes)

    return run


@pytest.mark.parametrize("backend", backends_of(neurons_module.operator))
@pytest.mark.parametrize("name", [*PARAMETERS, "g2g_stack"])
def test_derivatives_of_neurons_are_those_of_steps(backend, name):
    """Second ones, by another backward pass and by ``torch.func``, and those in forward mode."""
    function = operator_of(name, backend)
    x = torch.randn(5, 2, 43, generator=seeded(0)).requires_grad_()
    weight = torch.linspace(-1, 1, 10 if name == "g2g_stack" else 43)

    def loss(x, run=function):
        return ((run(x) + 0.1 * x.sum()) * weight).square().sum()

    with skip_where_refused():
        function(x)
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected_first,) = torch.autograd.grad(loss(exact, steps_of(name)), exact, create_graph=True)
    (expected,) = torch.autograd.grad(expected_first.square().sum(), exact)
    torch.testing.assert_close(first.double(), expected_first, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(second.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert expected.any()
    if name in PARAMETERS:  # of a parameter, where the input has no gradient
        of_parameter = []

        def at_once(x, decay):
            return neurons(x, Neurons(name, (decay, *PARAMETERS[name][1:])), backend=backend)

        for dtype, run in ((torch.float32, at_once), (torch.float64, steps_of(name))):
            decay = torch.tensor(PARAMETERS[name][0], dtype=dtype, requires_grad=True)
            value = (run(x.detach().to(dtype), decay) * weight).square().sum()
            (one,) = torch.autograd.grad(value, decay, create_graph=True)
            of_parameter.append(torch.autograd.grad(one.square(), decay)[0].double())
        torch.testing.assert_close(*of_parameter, rtol=1e-3, atol=1e-3)
    tangent = torch.ones_like(x)
    with torch.no_grad():
        _, along = torch.func.jvp(loss, (x.detach(),), (tangent,))
    torch.testing.assert_close(along, (expected_first.float() * tangent).sum(), rtol=1e-3, atol=1e-2)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), tangent))).tangent
    torch.testing.assert_close(dual, along)


def test_steps_are_differentiable_twice_and_in_forward_mode():
    beta, theta = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.5))
    current = torch.rand(4, 3, generator=seeded(0), dtype=torch.float64).requires_grad_()

    def smooth(current, beta, theta):
        """Of each step the membrane where it spikes, which is smooth between spikes."""
        membrane, total = None, 0.0
        for current_t in current:
            spikes, membrane = lif_step(current_t, membrane, beta, theta, "none")
            total = total + membrane * spikes.detach()
        return total

    assert torch.autograd.gradgradcheck(smooth, (current, beta, theta))
    first = current[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(lif_step(first, None, beta, theta)[0].sum(), first, create_graph=True)
    assert gradient.square().sum().requires_grad
    with torch.no_grad():
        forward = torch.func.jvp(lambda x: lif_step(x, None, beta, theta)[0], (first,), (torch.ones_like(first),))[1]
    torch.testing.assert_close(forward, gradient.detach())


@pytest.mark.ci
def test_inside_what_is_compiled_a_tangent_is_right(plain_memory):
    mask, (x, values, bias) = linear_case("ten outputs", torch.float32)
    x = x.detach()

    def linear(x):
        return g2g_linear(x, values, mask, bias)

    for run in (linear, operator_of("lif", None)):
        expected = torch.func.jvp(run, (x,), (x,))[1]
        compiled = torch.compile(lambda x, run=run: torch.func.jvp(run, (x,), (x,))[1], backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("backend", backends_of(linear_module.operator))
def test_tangents_of_incoming_gradients(backend):
    """Where only what follows the operator carries one; the backward pass is linear in it."""
    mask, (x, values, bias) = linear_case(CASES[0], torch.float32)
    y = g2g_linear(x, values, mask, bias, backend=backend)
    tangent = torch.randn(y.shape, generator=seeded(3))
    expected = torch.autograd.grad(y, (x, values), tangent, retain_graph=True)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, (x, values), forward_ad.make_dual(torch.ones_like(y), tangent))
        for grad, of_tangent in zip(grads, expected, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(grad).tangent, of_tangent)
