"""What stands in the padding of packed values counts for nothing: not a bit changes where it is NaN."""

import pytest
import torch
from helpers import MaskCase, device_of, seeded
from linear_cases import backend_result, inputs
from stack_cases import MIXER, SIZES, SMALL_STACKS, Stack, chain

from g2g_kernels import available_backends, g2g_linear
from g2g_kernels.triton import runtime

every_backend = pytest.mark.parametrize("backend", available_backends())
#: units that get kernels of their own on every backend, and units below 16, for which Triton takes a dense product
MASKS = {
    "units of 16": MaskCase(37, 45, 2, "interleaved", "index", 16),
    "ten outputs": MaskCase(10, 23, 4, "index", "index", 3),
}
STACKS_OF_UNITS = {"units of 16": chain(SIZES, 2, 16, *MIXER), "units of 4": SMALL_STACKS["ragged index"]}


def with_nan_in_padding(values, mask):
    assert mask.has_padding
    return values.masked_fill(~mask.valid(), torch.nan)


@every_backend
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_a_product_and_its_gradients(case, backend):
    mask = case.mask(p_inter=0.15, p_intra=0.3)
    x, values, bias = inputs(mask, 5)
    grad_output = torch.randn(5, mask.shape[0], generator=seeded(4))
    clean = backend_result(mask, x, values, bias, grad_output, backend)
    result = backend_result(mask, x, with_nan_in_padding(values, mask), bias, grad_output, backend)
    torch.testing.assert_close(result, clean, rtol=0, atol=0)
    assert not clean["values.grad"][~mask.valid()].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, by torch.func.jvp
@every_backend
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_derivatives_in_forward_mode_and_of_second_order(case, backend):
    mask = case.mask(p_inter=0.15, p_intra=0.3).to(device_of(backend))
    x, values, _ = (tensor.to(device_of(backend)) for tensor in inputs(mask, 5))

    def derivatives(values):
        def function(x, values):
            return g2g_linear(x, values, mask, backend=backend)

        _, tangent = torch.func.jvp(function, (x, values), (x.flip(0), values))
        leaves = x.clone().requires_grad_(), values.clone().requires_grad_()
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return tangent, *torch.autograd.grad(first[0].square().sum(), leaves)

    assert all(map(torch.equal, derivatives(with_nan_in_padding(values, mask)), derivatives(values)))


@pytest.mark.parametrize("cases", STACKS_OF_UNITS)
@pytest.mark.parametrize(
    ("backend", "way"),
    [(name, way) for name in available_backends() for way in ("pair", "fused")[: 1 + (name == "triton")]],
)
def test_a_stack_and_its_gradients(cases, way, backend, monkeypatch):
    monkeypatch.setattr(runtime, "assumed", runtime.Assumptions(dense=False, fused=way == "fused"))
    stack = Stack(STACKS_OF_UNITS[cases], steps=2, batch=2)
    clean = stack.run(torch.float32, backend)
    for number, mask in enumerate(stack.masks):
        stack.tensors[f"values{number}"].masked_fill_(~mask.valid(), torch.nan)
    assert any(mask.has_padding for mask in stack.masks)
    torch.testing.assert_close(stack.run(torch.float32, backend), clean, rtol=0, atol=0)
    assert clean["spikes2"].any()
