"""The backends of this library, registered like any other."""

from g2g_kernels.cpu import library
from g2g_kernels.dispatch import Backend, register_backend
from g2g_kernels.triton import runtime

register_backend(
    Backend("triton", runtime.unavailable, 30, runtime.only_by_name, "cuda", "triton", title="compiled Triton kernels")
)
register_backend(
    Backend(
        "cpu", library.unavailable, 20, device_type="cpu", detail=library.instruction_set, title="compiled CPU kernels"
    )
)
register_backend(Backend("torch", preference=0, title="plain PyTorch"))
