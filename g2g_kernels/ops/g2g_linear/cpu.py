"""``g2g_linear`` on the compiled CPU kernels: operators ``g2g::linear_forward`` (with its autograd formula) and
``g2g::linear_backward``. Inputs that hold nothing but 0 and 1, at a low rate, take the event-driven products.

Under autocast to bfloat16, products of dense inputs use bfloat16 factors and float32 sums (where the CPU has the
instructions; it rounds nothing elsewhere), and the output is bfloat16. Inputs and gradients that are bfloat16 are read
and written as such.
"""

from collections.abc import Sequence

import torch

from g2g_kernels.block_mask import BlockMask
from g2g_kernels.cpu import plans
from g2g_kernels.cpu.library import LinearArguments, bf16_wanted, event_limit, library, pointer, run
from g2g_kernels.cpu.plans import INDICES, indices, plan_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.derivatives import refuse_compiled_backward
from g2g_kernels.ops.g2g_linear.derivatives import Kernels, linear


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
    return plans.refuses(values)


def _converts(dtype: torch.dtype) -> bool:
    """Whether x of ``dtype`` gives what float32 would: spikes in bytes, bfloat16 under autocast."""
    return dtype == torch.uint8 or (dtype == torch.bfloat16 and bf16_wanted())


def g2g_linear(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.dtype == torch.bfloat16 else flat.to(torch.float32)
    tensors, bf16 = indices(mask), bf16_wanted()

    def product(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = None if bias is None else bias.contiguous()
        return torch.ops.g2g.linear_forward(x.contiguous(), values.contiguous(), bias, tensors, bf16)

    def gradients(grad_y, x, values, need_x, need_values, need_bias):
        return torch.ops.g2g.linear_backward(grad_y, x, values, tensors, bf16, need_x, need_values)

    if torch.compiler.is_compiling():  # which traces no Function with a forward mode
        y = product(flat, values, bias)
    else:
        y = linear(flat.contiguous(), values.contiguous(), bias, Kernels(product, gradients, mask, tuple(tensors)))
    return y.view(*x.shape[:-1], y.shape[-1])


_library = torch.library.Library("g2g", "FRAGMENT")
_library.define("linear_forward(Tensor x, Tensor values, Tensor? bias, Tensor[] indices, bool bf16) -> Tensor")
_library.define(
    "linear_backward(Tensor grad_y, Tensor x, Tensor values, Tensor[] indices, bool bf16, bool grad_x, "
    "bool grad_values) -> (Tensor, Tensor, Tensor)"
)


def _output_dtype(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def _arguments(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, mask_indices: Sequence[torch.Tensor], bf16: bool
) -> LinearArguments:
    if len(mask_indices) != INDICES:
        raise ValueError(f"a mask is described by {INDICES} tensors, not {len(mask_indices)}")
    out_size, in_size = mask_indices[2].shape[0], mask_indices[4].shape[0]
    for tensor, dtypes in ((x, (torch.float32, torch.bfloat16)), (values, (torch.float32,)), (bias, (torch.float32,))):
        if tensor is not None and not (
            tensor.dtype in dtypes and tensor.is_contiguous() and tensor.device.type == "cpu"
        ):
            raise ValueError("the compiled kernels need contiguous float32 tensors on the CPU; x may be bfloat16")
    if x.dim() != 2 or x.shape[1] != in_size or (bias is not None and bias.numel() != out_size):
        raise ValueError(f"x {tuple(x.shape)} or the bias does not fit a mask of [{out_size}, {in_size}] weights")
    plan = plan_for(mask_indices, values)
    arguments = LinearArguments(
        plan=plan.address,
        values=pointer(values),
        bias=pointer(bias),
        x=x.data_ptr(),
        rows=len(x),
        threads=torch.get_num_threads(),
        bf16=bf16 and library().g2g_has_bf16(),
        x_half=x.dtype == torch.bfloat16,
        y_half=bf16,
    )
    arguments.owner = plan  # outlives the call
    return arguments


def _forward(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, mask_indices: Sequence[torch.Tensor], bf16: bool
) -> torch.Tensor:
    arguments = _arguments(x, values, bias, mask_indices, bf16)
    y = workspace.empty((len(x), mask_indices[2].shape[0]), _output_dtype(bf16))
    arguments.y = y.data_ptr()
    arguments.event_limit = event_limit(arguments.bf16, backward=False)
    run(library().g2g_linear_forward, arguments)
    return y


def _forward_fake(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, mask_indices: Sequence[torch.Tensor], bf16: bool
) -> torch.Tensor:
    return x.new_empty(x.shape[0], mask_indices[2].shape[0], dtype=_output_dtype(bf16))


def _backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    mask_indices: Sequence[torch.Tensor],
    bf16: bool,
    grad_x: bool,
    grad_values: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = _arguments(x, values, None, mask_indices, bf16)
    out_size = mask_indices[2].shape[0]
    if grad_y.shape != (len(x), out_size) or grad_y.dtype != _output_dtype(bf16) or not grad_y.is_contiguous():
        raise ValueError("grad_y must be contiguous and of the output's shape and dtype")
    to_x = workspace.empty(tuple(x.shape), x.dtype) if grad_x else x.new_empty(0)
    to_values = workspace.empty(tuple(values.shape)) if grad_values else values.new_empty(0)
    to_bias = values.new_empty(out_size)
    arguments.grad_y = grad_y.data_ptr()
    arguments.event_limit = event_limit(arguments.bf16, backward=True)
    arguments.grad_x, arguments.grad_values = pointer(to_x), pointer(to_values)
    arguments.grad_bias = to_bias.data_ptr()
    run(library().g2g_linear_backward, arguments)
    return to_x, to_values, to_bias


def _backward_fake(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    mask_indices: Sequence[torch.Tensor],
    bf16: bool,
    grad_x: bool,
    grad_values: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    to_x, to_values = x.new_empty(x.shape if grad_x else 0), values.new_empty(values.shape if grad_values else 0)
    return to_x, to_values, values.new_empty(mask_indices[2].shape[0])


def _setup_context(ctx, inputs, output):
    x, values, _, mask_indices, ctx.bf16 = inputs
    ctx.save_for_backward(x, values, *mask_indices)


def _autograd(ctx, grad_y):
    x, values, *mask_indices = ctx.saved_tensors
    need_x, need_values, need_bias, *_ = ctx.needs_input_grad
    to_x, to_values, to_bias = torch.ops.g2g.linear_backward(
        grad_y.contiguous(), x, values, mask_indices, ctx.bf16, need_x, need_values
    )
    return (
        to_x if need_x else None,
        to_values if need_values else None,
        to_bias if need_bias else None,
        [None] * len(mask_indices),
        None,
    )


for _name, _function, _fake in (
    ("linear_forward", _forward, _forward_fake),
    ("linear_backward", _backward, _backward_fake),
):
    _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"g2g::{_name}", _fake, lib=_library)
torch.library.register_autograd("g2g::linear_forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("g2g::linear_backward", refuse_compiled_backward, lib=_library)
