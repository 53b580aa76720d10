"""Inputs of g2g_linear, and its results by formula and by backend."""

import torch
from helpers import ErrorRatios, dense_by_loop, device_of, packed_randn, rms, seeded, unread_padding

from g2g_kernels import BlockMask, GroupLayout, g2g_linear


def inputs(mask: BlockMask, *batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [*batch, in], packed values and a bias, float32."""
    x = torch.randn(*batch, mask.shape[1], generator=seeded(1))
    return x, unread_padding(mask, packed_randn(mask, 2)), torch.randn(mask.shape[0], generator=seeded(3))


def dense_result(mask: BlockMask, x, values, bias, grad_output) -> dict[str, torch.Tensor]:
    """Output and gradients of y = x·Wᵀ + b by their formulas, in float64, with W built unit by unit."""
    x, values, bias, grad_output = (tensor.double() for tensor in (x, values, bias, grad_output))
    weight = dense_by_loop(mask, values)
    flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
    return {
        "output": x @ weight.T + bias,
        "x.grad": grad_output @ weight,
        "values.grad": mask.pack(flat_grad.T @ flat_x),
        "bias.grad": flat_grad.sum(0),
    }


def backend_result(mask: BlockMask, x, values, bias, grad_output, backend: str | None) -> dict[str, torch.Tensor]:
    device = device_of(backend)
    x, values, bias = (tensor.detach().to(device).requires_grad_() for tensor in (x, values, bias))
    output = g2g_linear(x, values, mask.to(device), bias, backend=backend)
    output.backward(grad_output.to(device, output.dtype))
    mask.to("cpu")
    results = {"output": output.detach(), "x.grad": x.grad, "values.grad": values.grad, "bias.grad": bias.grad}
    return {name: tensor.cpu() for name, tensor in results.items()}


def check_one_gradient_alone(mask: BlockMask, needed: str, backend: str) -> None:
    device = device_of(backend)
    x, values, bias = inputs(mask, 11)
    grad_output = torch.randn(11, mask.shape[0], generator=seeded(4))
    exact = dense_result(mask, x, values, bias, grad_output)[f"{needed}.grad"]
    tensors = {"x": x.to(device), "values": values.to(device), "bias": bias.to(device)}
    tensors[needed].requires_grad_()
    output = g2g_linear(tensors["x"], tensors["values"], mask.to(device), tensors["bias"], backend=backend)
    output.backward(grad_output.to(device))
    assert rms(tensors[needed].grad.cpu() - exact) <= 1e-6 * rms(exact)  # float32 rounding
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [needed]


def check_rows_and_columns_without_units(block_size: int, backend: str) -> None:
    """Block rows 0, 3 and 5 and block columns 1, 4 and 5 are empty: y is the bias there, and x gets no gradient."""
    layout = GroupLayout(6 * block_size, 1)
    mask = BlockMask(layout, layout, torch.tensor([1, 2, 4, 2]), torch.tensor([0, 3, 2, 0]), block_size)
    x, values, bias = inputs(mask, 8)
    grad_output = torch.randn(8, 6 * block_size, generator=seeded(4))
    exact = dense_result(mask, x, values, bias, grad_output)
    results = backend_result(mask, x, values, bias, grad_output, backend)
    for empty, rows, expected in (("output", (0, 3, 5), bias.expand(8, -1)), ("x.grad", (1, 4, 5), 0 * x)):
        for row in rows:
            of = slice(row * block_size, (row + 1) * block_size)
            assert torch.equal(results[empty][:, of], expected[:, of])
    for name, actual in results.items():
        assert rms(actual - exact[name]) <= 1e-6 * rms(exact[name]), name  # float32 rounding


def check_autocast(masks: list[BlockMask], samples: int, dtype: torch.dtype, backend: str) -> None:
    """Weights stay float32 and get float32 gradients; the product has the dtype, and its operands are rounded to it."""
    ratios = ErrorRatios()
    for mask in masks:
        # operands that the dtype holds exactly, so that the float64 result needs no rounding of its own
        grad_output = torch.randn(samples, mask.shape[0], generator=seeded(4))
        tensors = [tensor.to(dtype).float() for tensor in (*inputs(mask, samples), grad_output)]
        exact, results = dense_result(mask, *tensors), {}
        for name in ("torch", backend):
            with torch.autocast(device_of(name), dtype):
                results[name] = backend_result(mask, *tensors, name)
        assert results[backend]["output"].dtype == dtype
        assert results[backend]["values.grad"].dtype == torch.float32
        for name, actual in results[backend].items():
            ratios.add(name, actual, results["torch"][name], exact[name])
            # one rounding of a result
            assert rms(actual - exact[name]) <= torch.finfo(dtype).eps * rms(exact[name]), name
    ratios.check(cases=len(masks))


def check_a_mask_without_any_unit(mask: BlockMask, backend: str) -> None:
    x, values, bias = inputs(mask, 4)
    results = backend_result(mask, x, values, bias, torch.ones(4, mask.shape[0]), backend)
    assert torch.equal(results["output"], bias.expand(4, -1))
    assert not results["x.grad"].any()
    assert results["values.grad"].shape == (0, *mask.unit_shape)
    assert results["bias.grad"].tolist() == [4.0] * mask.shape[0]
