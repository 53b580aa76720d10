"""select_device's order of preference and errors, and what a training step would ask of DirectML, MPS and XPU. DirectML
needs Windows and the package ``torch-directml``; a module of that name stands in for it here."""

import sys
from types import SimpleNamespace

import pytest
import torch
from covering import drawn_cases
from helpers import MaskCase, chained, packed_randn, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from g2g_kernels import Neurons, g2g_stack, select_device
from g2g_kernels.ops.neurons import RESETS
from g2g_kernels.ops.neurons.surrogates import SURROGATES

DML = torch.device("privateuseone:0")  # what torch_directml.device() gives


def directml(monkeypatch, device: torch.device | None = DML, adapter: bool = True) -> None:
    """Installs a stand-in for torch_directml, or with ``device=None`` makes its import fail."""
    module = SimpleNamespace(device=lambda: device, is_available=lambda: adapter) if device is not None else None
    monkeypatch.setitem(sys.modules, "torch_directml", module)


def cuda(monkeypatch, devices: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


def mps_and_xpu(monkeypatch, devices: int) -> None:
    """One device of Apple's at most, as many of Intel's as there are said to be."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: devices)


@pytest.mark.parametrize(
    ("package", "adapter", "devices", "expected"),
    [
        *((True, True, devices, DML) for devices in (1, 0)),
        *((package, False, 1, torch.device("cuda")) for package in (True, False)),
        *((package, False, 0, torch.device("cpu")) for package in (True, False)),
    ],
)
def test_directml_then_cuda_then_cpu(monkeypatch, package, adapter, devices, expected):
    directml(monkeypatch, DML if package else None, adapter)
    cuda(monkeypatch, devices)
    mps_and_xpu(monkeypatch, 2)  # which have to be named
    assert select_device() == select_device("auto") == expected
    if not adapter:
        with pytest.raises(ValueError, match=r"device='directml' needs the package torch-directml \(pip install"):
            select_device("directml")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps", "xpu", "xpu:1", "directml"])
def test_a_named_device_is_that_device(monkeypatch, name):
    directml(monkeypatch)
    cuda(monkeypatch, 2)
    mps_and_xpu(monkeypatch, 2)
    assert select_device(name) == (DML if name == "directml" else torch.device(name))


@pytest.mark.parametrize(
    ("devices", "names", "message"),
    [
        (1, "tpu, gpu, , cpu:x, hpu, meta", "is .*; give auto, cpu, cuda, cuda:N, directml, mps"),
        (0, "cuda, cuda:0, mps, xpu, xpu:0", ": PyTorch .* finds no {kind} device here; give cpu or auto"),
        (2, "cuda:2, xpu:2", ": this machine has {kind} devices 0 … 1"),
        (2, "mps:1", ": this machine has {kind} devices 0 … 0"),
    ],
)
def test_devices_that_are_unknown_or_not_there_are_refused(monkeypatch, devices, names, message):
    directml(monkeypatch)
    cuda(monkeypatch, devices)
    mps_and_xpu(monkeypatch, devices)
    for name in names.split(", "):
        words = message.format(kind=name.partition(":")[0].upper())
        with pytest.raises(ValueError, match=f"^device='{name}' ?{words}"):
            select_device(name)


# torch-directml 0.2.5 is built for torch 2.4. An operator it lacks runs on the CPU, with a copy there and back at each
# call and a warning, or fails (as aten::_foreach_* and aten::_thnn_fused_lstm_cell do, microsoft/DirectML issues 604
# and 654). So the plain backend keeps to element-wise arithmetic, matrix products, reductions over whole dimensions,
# views and copies along one index. Every entry was looked at; add to these lists only what is of that kind.

#: no computation on a device: queries of dtypes and views of the same memory
VIEWS = {
    "detach.default", "expand.default", "permute.default", "promote_types.default", "select.int", "t.default",
    "unsqueeze.default", "view.default", "_unsafe_view.default",
}  # fmt: skip
FORWARD_AND_BACKWARD = VIEWS | {
    # memory and copies
    "_to_copy.default", "cat.default", "clone.default", "copy_.default", "empty_like.default", "new_empty.default",
    "new_zeros.default", "ones_like.default", "zeros.default",
    # packing: whole tiles by a list of distinct indices, nothing is summed
    "index_copy_.default", "index_select.default",
    # element-wise
    "abs.default", "add.Tensor", "add_.Tensor", "addcmul_.default", "bitwise_and.Tensor", "bitwise_not.default",
    "bitwise_or.Tensor", "clamp.default", "div.Scalar", "exp.default", "ge.Scalar", "gt.Scalar",
    "gt.Tensor",  # U > θ, which Python asks as θ < U where θ is a Parameter (a subclass of Tensor)
    "lt.Scalar", "lt.Tensor", "masked_fill.Scalar", "neg.default", "le.Scalar", "mul.Scalar", "mul.Tensor",
    "mul_.Tensor", "pow.Tensor_Scalar", "reciprocal.default", "rsub.Scalar", "sigmoid.default", "sub.Tensor",
    "sub_.Tensor", "where.self",
    # products and reductions
    "addmm.default", "mean.dim", "mm.default", "sum.dim_IntList",
    # cross-entropy
    "_log_softmax.default", "_log_softmax_backward_data.default", "nll_loss_backward.default",
    "nll_loss_forward.default",
}  # fmt: skip
ADAM = {
    "_local_scalar_dense.default",  # the step count, which Adam keeps on the CPU
    "lift_fresh.default",  # the same, made from a number
    "add.Tensor", "add_.Tensor", "addcdiv_.default", "addcmul_.default", "div.Tensor",
    # DirectML has no lerp: it falls back to the CPU (microsoft/DirectML issue 675), right but slow. PyTorch's own Adam
    # uses it, in torch 2.4 too, so only an optimizer written without it would stay on the device.
    "lerp_.Scalar", "mul_.Tensor", "sqrt.default", "zeros_like.default",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Notes every operator, and checks that each result is a plain tensor of no more than 32-bit floats."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = str(function).split(".", 1)
        if namespace != "profiler":  # the optimizer's marks for the profiler: no tensors
            self.operators.add(name if namespace == "aten" else str(function))
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                assert tensor.layout == torch.strided, f"{function} gives a tensor of layout {tensor.layout}"
                assert tensor.dtype not in (torch.float64, torch.complex128), f"{function} gives {tensor.dtype}"
        return result


CASES = {
    "whole units": (MaskCase(16, 12, 2, "index", "index", 2), MaskCase(8, 16, 2, "index", "index", 2)),
    "clipped units": (MaskCase(17, 11, 3, "random", "interleaved", 4), MaskCase(10, 17, 3, "interleaved", "random", 4)),
}


def test_a_training_step_uses_plain_operators_only(monkeypatch, plain_memory):
    """Forward, cross-entropy on the counts, a rate penalty, backward and Adam. MPS and XPU devices run the same plain
    backend, and so are held to the same list."""
    directml(monkeypatch, torch.device("cpu"))
    device = select_device("directml")
    used: dict[str, set[str]] = {"step": set(), "adam": set()}
    options = {"cases": CASES, "steps": (None, 4), "per_neuron": (False, True)}
    for name, case in drawn_cases(options | {"reset": RESETS, "surrogate": SURROGATES}).items():
        print(name)
        cases, steps, per_neuron, *of_neurons = case.values()
        cases, learned, connections = CASES[cases], [], []
        for number, each in enumerate(cases):
            mask = each.mask().to(device)
            neurons = (mask.shape[0],) if per_neuron else ()
            drawn = (
                packed_randn(mask, number),
                torch.zeros(mask.shape[0]),
                torch.full(neurons, 0.9),
                torch.ones(neurons),
            )
            values, bias, *own = (torch.nn.Parameter(tensor.to(device)) for tensor in drawn)
            connections.append((values, mask, bias, tuple(own)))
            learned += [values, bias, *own]
        shape = (6, cases[0].in_size) if steps else (4, 6, cases[0].in_size)
        x = (3 * torch.rand(shape, generator=seeded(1))).to(device)
        labels = torch.randint(cases[1].out_size, (6,), generator=seeded(2)).to(device)
        optimizer = torch.optim.Adam(learned, lr=1e-3, weight_decay=1e-4, foreach=False)
        before = [tensor.detach().clone() for tensor in learned]
        with Recorder() as step:
            numbered = enumerate(connections)
            layers = [chained(k, *of, Neurons("lif", own, *of_neurons)) for k, (*of, own) in numbered]
            activity = g2g_stack(x, layers, steps, backend="torch")
            loss = torch.nn.functional.cross_entropy(activity.counts, labels)
            loss = loss + 1e-2 * (activity.rates[0] - 0.1).square().sum(0)
            optimizer.zero_grad()
            loss.backward()
        with Recorder() as adam:
            optimizer.step()
        used["step"] |= step.operators
        used["adam"] |= adam.operators
        assert all(not torch.equal(old, new) for old, new in zip(before, learned, strict=True))
    for phase, listed in (("step", FORWARD_AND_BACKWARD), ("adam", ADAM)):
        assert used[phase] <= listed, "see above the lists whether such an operator may be added to them"
    # the recorder was at work
    assert {"mm.default", "index_copy_.default", "sigmoid.default"} <= used["step"]
    assert {"lerp_.Scalar", "addcdiv_.default"} <= used["adam"]
    # no scatter with a reduction, no sparse or custom operator, no multi-tensor update
    lacking = ("::", "scatter", "index_add", "index_put", "sparse", "foreach", "fused", "embedding", "sort", "cumsum")
    assert not [name for name in FORWARD_AND_BACKWARD | ADAM if any(word in name for word in lacking)]
