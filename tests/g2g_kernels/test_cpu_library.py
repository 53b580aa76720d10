"""The C interface of the compiled CPU kernels: what is refused when it is loaded, and each neuron model run by it."""

import ctypes
import itertools
import math

import pytest
import snntorch
import torch
from helpers import ErrorRatios, rms, seeded

from g2g_kernels.cpu import library
from g2g_kernels.cpu.library import NeuronLoopArguments, neuron_arguments, pointer
from g2g_kernels.ops.neurons.models import MODELS, RESETS, Neurons
from g2g_kernels.ops.neurons.surrogates import SURROGATES

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


# --- what is compared at load ---------------------------------------------------------------------------------------


def _reason() -> str | None:
    """Why a library loaded now would be refused."""
    return library._load.__wrapped__()[1]


def test_the_library_says_what_is_mirrored():
    assert _reason() is None


def _with_fields(structure: type[ctypes.Structure], fields: list) -> type[ctypes.Structure]:
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize("name", library.STRUCTURES)
def test_another_order_of_fields_is_refused_by_the_name_of_the_first(name, monkeypatch):
    structure = library.STRUCTURES[name]
    fields = list(structure._fields_)
    # the first two neighbours of different sizes, so that the second one lies elsewhere
    place = next(i for i in range(len(fields) - 1) if ctypes.sizeof(fields[i][1]) != ctypes.sizeof(fields[i + 1][1]))
    fields[place : place + 2] = reversed(fields[place : place + 2])
    monkeypatch.setitem(library.STRUCTURES, name, _with_fields(structure, fields))
    reason = _reason()
    assert reason is not None
    assert "built from another version of g2g" in reason
    assert any(f"({name}.{field} is" in reason for field, *_ in fields[place:])


def test_a_field_more_or_less_is_refused_by_its_name(monkeypatch):
    fields = list(library.LayerArguments._fields_)
    monkeypatch.setitem(library.STRUCTURES, "Layer", _with_fields(library.LayerArguments, fields[:-1]))
    assert f"Layer.{fields[-1][0]} is 'offset" in _reason()
    monkeypatch.setitem(
        library.STRUCTURES, "Layer", _with_fields(library.LayerArguments, [*fields, ("more", ctypes.c_int32)])
    )
    assert "Layer.more is 'missing' there" in _reason()
    renamed = [(fields[0][0] + "s", fields[0][1]), *fields[1:]]
    monkeypatch.setitem(library.STRUCTURES, "Layer", _with_fields(library.LayerArguments, renamed))
    assert "Layer.plan is 'offset 0, size 8' there and 'missing' here" in _reason()


def test_other_numbers_of_options_and_other_models_are_refused(monkeypatch):
    monkeypatch.setitem(library.SURROGATES, "sigmoid", 3)
    assert "Surrogate.sigmoid is '2' there and '3' here" in _reason()
    monkeypatch.undo()
    monkeypatch.setitem(MODELS, "lif", MODELS["lif"]._replace(parameters=("threshold", "beta")))
    assert "Model.lif.parameters is 'beta threshold' there and 'threshold beta' here" in _reason()
    monkeypatch.undo()
    monkeypatch.delitem(library.RESETS, "none")
    assert "Reset.none is '2' there and 'missing' here" in _reason()


def test_both_sides_know_the_options_that_are_declared():
    assert tuple(library.RESETS) == RESETS
    assert list(library.SURROGATES) == list(SURROGATES)


# --- neurons alone --------------------------------------------------------------------------------------------------

EVERY = 5


def _run(model, current, parameters, steps, options, grad_spikes) -> list[torch.Tensor]:
    """Spikes, ∂L/∂I and the gradients of the parameters by the compiled kernels; what they write starts as NaN."""
    shape = grad_spikes.shape
    states = len(MODELS[model].states)
    spikes = torch.full(shape, math.nan)
    kept = torch.full(((shape[0] - 1) // EVERY, states, *shape[1:]), math.nan)
    grads = [torch.full_like(value, math.nan) for value in (current, *parameters)]
    arguments = NeuronLoopArguments(
        neurons=neuron_arguments(Neurons(model, tuple(parameters), *options), grads[1:]),
        current=current.data_ptr(),
        samples=math.prod(shape[1:-1]),
        size=shape[-1],
        steps=shape[0],
        threads=2,
        held=steps is not None,
        every=EVERY,
        spikes=spikes.data_ptr(),
        kept=pointer(kept),
        grad_spikes=grad_spikes.data_ptr(),
        grad_current=grads[0].data_ptr(),
    )
    library.run(library.library().g2g_neurons_forward, arguments)
    library.run(library.library().g2g_neurons_backward, arguments)
    return [spikes, *grads]


def _surrogate(name: str, alpha: float):
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x > 0).to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            return grad * SURROGATES[name].derivative(*ctx.saved_tensors, alpha)

    return Spike.apply


def _by_snntorch(current, parameters, steps, options, grad_spikes, dtype) -> list[torch.Tensor]:
    reset, surrogate, alpha = options
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (current, *parameters)]
    neuron = snntorch.Synaptic(
        alpha=0.0, beta=0.0, spike_grad=_surrogate(surrogate, alpha), reset_mechanism=reset, threshold=0.0
    )
    neuron.alpha, neuron.beta, neuron.threshold = leaves[1:]
    synaptic_current = membrane = torch.zeros(grad_spikes.shape[1:], dtype=dtype)
    spikes = []
    for t in range(len(grad_spikes)):
        spike, synaptic_current, membrane = neuron(leaves[0] if steps else leaves[0][t], synaptic_current, membrane)
        spikes.append(spike)
    (torch.stack(spikes) * grad_spikes.to(dtype)).sum().backward()
    return [torch.stack(spikes).detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("steps", [None, 23])
@pytest.mark.parametrize("per_neuron", [False, True])
def test_synaptic_neurons_alone_are_snntorchs(steps, per_neuron):
    """Spikes to the last bit, gradients as near to float64 as snnTorch's own; some decays lie outside 0 … 1."""
    ratios = ErrorRatios()
    cases = list(itertools.product([(3, 45), (2, 2, 70)], library.RESETS, SURROGATES))
    for number, (shape, *options) in enumerate(cases):
        draw = seeded(number)
        current = torch.randn(*(() if steps else (23,)), *shape, generator=draw) * 0.5 + 0.15
        if per_neuron:
            decays = [torch.rand(shape[-1], generator=draw) * 1.2 - 0.1 for _ in range(2)]
        else:
            decays = [torch.tensor(0.7), torch.tensor(0.9)]
        parameters = [*decays, torch.rand(shape[-1] if per_neuron else (), generator=draw) + 0.5]
        grad_spikes = torch.randn(23, *shape, generator=draw)
        options = (*options, 2.0)
        actual = _run("synaptic", current, parameters, steps, options, grad_spikes)
        plain = _by_snntorch(current, parameters, steps, options, grad_spikes, torch.float32)
        exact = _by_snntorch(current, parameters, steps, options, grad_spikes, torch.float64)
        assert torch.equal(actual[0], plain[0])
        assert torch.equal(actual[0].double(), exact[0]), "a draw with a membrane too near its threshold"
        names = ("current", *MODELS["synaptic"].parameters)
        for name, *gradients in zip(names, actual[1:], plain[1:], exact[1:], strict=True):
            ratios.add(name, *gradients)
            # that of a shared parameter is a sum of thousands of terms of about 1, which may all but cancel
            scale = max(rms(gradients[2]), 1.0) if gradients[2].dim() == 0 else rms(gradients[2])
            assert rms(gradients[0].double() - gradients[2]) < 3e-5 * scale, f"{name} is wrong"
    ratios.check(len(cases))


def test_synaptic_without_a_synapse_is_lif():
    """With γ = 0 the two are one model, but for what "zero" discharges."""
    draw = seeded(0)
    current, grad_spikes = torch.randn(2, 12, 3, 45, generator=draw)
    beta, threshold = torch.rand(45, generator=draw), torch.rand(45, generator=draw) + 0.2
    for reset, surrogate in itertools.product(("subtract", "none"), SURROGATES):
        options = (reset, surrogate, 1.5)
        lif = _run("lif", current, [beta, threshold], None, options, grad_spikes)
        synaptic = _run("synaptic", current, [torch.zeros(45), beta, threshold], None, options, grad_spikes)
        del synaptic[2]
        for one, other in zip(lif, synaptic, strict=True):
            assert torch.equal(one, other)
