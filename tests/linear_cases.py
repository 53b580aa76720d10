"""Inputs of g2g_linear, and its results by formula and by backend."""

import torch
from helpers import dense_by_loop, device_of, packed_randn, seeded

from g2g_kernels import BlockMask, g2g_linear


def inputs(mask: BlockMask, *batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [*batch, in], packed values and a bias, float32."""
    x = torch.randn(*batch, mask.shape[1], generator=seeded(1))
    return x, packed_randn(mask, 2), torch.randn(mask.shape[0], generator=seeded(3))


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
