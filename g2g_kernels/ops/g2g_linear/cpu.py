"""``g2g_linear`` on the compiled CPU kernels: operators ``g2g::linear_forward`` (with its autograd formula) and
``g2g::linear_backward``. Inputs of zeros and ones, at a low rate, take the event-driven products.

Under autocast to bfloat16, products of dense inputs use bfloat16 factors and float32 sums (if the CPU has the
instructions; otherwise nothing is rounded), and the output is bfloat16. bfloat16 inputs and gradients are read and
written as such.
"""

from ctypes import Structure
from typing import Any

import torch

from g2g_kernels.cpu import plans
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import bf16_wanted, event_limit, library, pointer, run
from g2g_kernels.cpu.plans import Plan, in_lists, lists_for, plan_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.ops.g2g_linear.call import LinearCall, operator_of, product
from g2g_kernels.ops.record import Backward


def refuses(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    for tensor in (x, values, bias):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"needs tensors on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32 and not (tensor is x and _converts(x.dtype)):
            return f"needs float32 tensors, not {tensor.dtype}"
    if x.numel() == 0:
        return "needs an input that is not empty"
    return plans.refuses(mask, values, "linear")


def _converts(dtype: torch.dtype) -> bool:
    """Whether x of ``dtype`` gives the same result as float32: spikes in bytes, bfloat16 under autocast."""
    return dtype == torch.uint8 or (dtype == torch.bfloat16 and bf16_wanted())


def g2g_linear(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> torch.Tensor:
    read = x if x.dtype == torch.bfloat16 else x.to(torch.float32)
    dtype = torch.bfloat16 if bf16_wanted() else torch.float32
    return product(FORWARD, read, values, mask, bias, dtype)


def _arguments(call: LinearCall, backward: bool) -> tuple[Structure, Plan]:
    """The arguments of a kernel, and the plan that must outlive it."""
    x, values, mask, bias, dtype = call
    if in_lists(mask.grid, values.shape, "linear"):
        plan = lists_for(mask, values, "cols" if backward else "rows")
        given: dict[str, Any] = {"lists": plan.address, "weights": values.numel()}
    else:
        plan = plan_for(mask, values)
        bf16 = dtype == torch.bfloat16 and library().g2g_has_bf16()
        given = {"plan": plan.address, "bf16": bf16, "event_limit": event_limit(bf16, backward)}
    structure = structures.Linear(
        values=pointer(values),
        bias=pointer(bias),
        x=x.data_ptr(),
        rows=len(x),
        threads=torch.get_num_threads(),
        x_half=x.dtype == torch.bfloat16,
        y_half=dtype == torch.bfloat16,
        **given,
    )
    return structure, plan


def _forward(call: LinearCall, keep: bool) -> torch.Tensor:
    arguments, _plan = _arguments(call, backward=False)
    y = workspace.empty((len(call.x), call.mask.shape[0]), call.dtype)
    arguments.y = y.data_ptr()
    run(library().g2g_linear, arguments)
    return y


def _backward(given: Backward) -> list[torch.Tensor | None]:
    grad_y: Any
    call, _, (grad_y,), _ = given
    arguments, _plan = _arguments(call, backward=True)
    grads, to = given.made(workspace.alike)
    # the kernel of tiles always writes them
    sums = call.values.new_empty(call.mask.shape[0]) if to.bias is None else to.bias
    arguments.grad_y, arguments.grad_x = grad_y.data_ptr(), pointer(to.x)
    arguments.grad_values, arguments.grad_bias = pointer(to.values), sums.data_ptr()
    run(library().g2g_linear, arguments, backward=True)
    return grads


FORWARD = operator_of("", ("CPU",), _forward, _backward)
