"""Stacks of layers of spiking neurons, small and lively, and draws that rounding cannot change."""

import itertools
import math
from collections.abc import Iterator

import torch
from helpers import MaskCase, device_of, lif_by_autograd, lif_layer, packed_randn, rms, seeded, unread_padding

from g2g_kernels import Population, g2g_stack
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.triton.runtime import interpreted

T, B = 9, 5


def chain(sizes: tuple[int, ...], groups: int, block_size: int, *kinds: str) -> tuple[MaskCase, ...]:
    """Layers between populations of these sizes; of each layer the kinds of its outputs' and its inputs' groups."""
    of = [kind.split() for kind in kinds] * (len(sizes) - len(kinds))
    return tuple(
        MaskCase(out, into, groups, *each, block_size)
        for (into, out), each in zip(itertools.pairwise(sizes), of, strict=True)
    )


SIZES, MIXER = (21, 38, 26, 10), ("index index", "interleaved interleaved", "index index")
#: whole and clipped units, single weights, and block size 64 where no group is that large
STACKS = {
    "ragged index": chain(SIZES, 4, 4, "index index"),
    "mixer": chain(SIZES, 4, 3, *MIXER),
    "random single weights": chain(SIZES, 8, 1, "random random"),
    "one unit a group": chain(SIZES, 2, 64, "random index", "interleaved random", "index random"),
}
#: for Triton's interpreter, to which every unit is a call
SMALL_STACKS = {
    "ragged index": chain((9, 14, 10, 6), 2, 4, "index index"),
    "random single weights": chain((9, 14, 10, 6), 3, 1, "random random"),
}


def stacks_on(backend: str) -> dict[str, tuple[MaskCase, ...]]:
    return SMALL_STACKS if backend == "triton" and interpreted() else STACKS


class Stack:
    """Tensors of a stack of layers, by name, that can be run in any dtype on any backend."""

    def __init__(
        self, cases, steps: int | None, per_neuron: bool = True, bias: bool = True, seed: int = 0, batch: int = B,
        dropout: float = 0.0, **density: float,
    ) -> None:  # fmt: skip
        draw = seeded(seed + 100)
        self.steps = steps
        drawn = [torch.rand(batch, case.out_size, generator=seeded(seed + 200)) < dropout for case in cases]
        self.dropped = drawn if dropout else [None] * len(cases)
        self.masks = [case.mask(seed=seed + number, **density) for number, case in enumerate(cases)]
        shape = (batch, cases[0].in_size) if steps else (T, batch, cases[0].in_size)
        self.tensors = {"x": torch.rand(shape, generator=draw) * 2}
        for number, mask in enumerate(self.masks):
            self.tensors[f"values{number}"] = unread_padding(mask, packed_randn(mask, seed + 10 + number) * 2)
            if bias:
                self.tensors[f"bias{number}"] = torch.rand(mask.shape[0], generator=draw) * 0.3 + 0.1
            of_neurons = mask.shape[0] if per_neuron else 1
            self.tensors[f"beta{number}"] = 0.7 + 0.25 * torch.rand(of_neurons, generator=draw)
            self.tensors[f"threshold{number}"] = 0.6 + 0.5 * torch.rand(of_neurons, generator=draw)

    def layers(self, tensors: dict[str, torch.Tensor], **options) -> list[Population]:
        """The populations of these tensors, the masks moved to where they are."""
        layers, device = [], tensors["x"].device
        for k, (mask, dropped) in enumerate(zip(self.masks, self.dropped, strict=True)):
            own = (tensors.get(f"{name}{k}") for name in ("bias", "beta", "threshold"))
            out = None if dropped is None else dropped.to(device)
            layers.append(lif_layer(tensors[f"values{k}"], mask.to(device), *own, out, k, **options))
        return layers

    def leaves(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
        return {name: tensor.to(device, dtype).clone().requires_grad_() for name, tensor in self.tensors.items()}

    def margin(self, reset: str = "subtract", edge: float = 0.0) -> float:
        """The least distance of a float64 membrane to its threshold, or to ``edge`` above or below it."""
        tensors, least = {name: tensor.double() for name, tensor in self.tensors.items()}, math.inf
        x = tensors["x"] if self.steps is None else tensors["x"].expand(self.steps, -1, -1)
        for layer in self.layers(tensors):
            (feed,) = layer.connections
            current = x @ feed.mask.unpack(feed.values).T + (0 if feed.bias is None else feed.bias)
            beta, threshold = layer.neurons.parameters
            x, membranes = lif_by_autograd(current, beta, threshold, reset, SURROGATES["atan"].primitive, 2.0)
            distance = (membranes - threshold).abs()
            if layer.dropped is not None:
                x, distance = x.masked_fill(layer.dropped, 0), distance.masked_fill(layer.dropped, math.inf)
            least = min(least, distance.min().item(), (distance - edge).abs().min().item())
        return least

    def run(self, dtype: torch.dtype, backend: str, **options) -> dict[str, torch.Tensor]:
        """Counts, rates, spikes and all gradients of :func:`loss`, on the CPU."""
        leaves = self.leaves(dtype, device_of(backend))
        activity = g2g_stack(leaves["x"], self.layers(leaves, **options), self.steps, backend=backend)
        loss(activity.counts, activity.rates).backward()
        for mask in self.masks:
            mask.to("cpu")
        return results(activity.counts, activity.rates, [spikes.dense() for spikes in activity.spikes], leaves)


def rounded(stack: Stack, dtype: torch.dtype) -> Stack:
    """The stack with currents exact in ``dtype``, so that all dtypes have the same spikes; only gradients round."""
    grid = 1 if dtype == torch.bfloat16 else 4  # eight bits of a current are 16ths below 16
    for name, tensor in stack.tensors.items():
        if name.startswith("values"):
            tensor.copy_((tensor * 16).round().clamp(-8, 8) / 16)
        elif name.startswith("x"):
            tensor.copy_((tensor * grid).round() / grid)
        elif name.startswith("bias"):
            tensor.copy_((tensor * 4).round() / 4)
        else:
            tensor.copy_(tensor.to(dtype))
    return stack


def loss(counts: torch.Tensor, rates) -> torch.Tensor:
    """Weights of both signs on the counts, and every layer's rates, as the firing-rate regulariser uses them."""
    weights = torch.randn(counts.shape, generator=seeded(77)).to(counts)
    return (counts * weights).sum() + sum(10 * (rate - 0.1).square().sum() for rate in rates)


def results(counts, rates, spikes, leaves) -> dict[str, torch.Tensor]:
    named = {"counts": counts, **{f"rates{k}": rate for k, rate in enumerate(rates)}}
    named |= {f"spikes{k}": spike for k, spike in enumerate(spikes)}
    named |= {f"{name}.grad": leaf.grad for name, leaf in leaves.items()}
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


def check_one_output(cases, used: str, backend: str) -> None:
    """Gradients of a loss on the counts only, or on one layer's rates only; behind that layer there are none."""
    stack, gradients = clear_stack(cases, T), []
    for dtype, name in ((torch.float64, "torch"), (torch.float32, backend)):
        leaves = stack.leaves(dtype, device_of(name))
        activity = g2g_stack(leaves["x"], stack.layers(leaves), T, backend=name)
        output = activity.counts if used == "counts" else activity.rates[int(used[-1])]
        (output * torch.randn(output.shape, generator=seeded(3)).to(output)).sum().backward()
        gradients.append({n: torch.zeros(of.shape) if of.grad is None else of.grad.cpu() for n, of in leaves.items()})
    assert rms(gradients[0]["x"]) > 0
    for name, expected in gradients[0].items():
        # float32 rounding through three layers
        assert rms(gradients[1][name] - expected) <= 1e-4 * rms(expected), name


def clear_of_thresholds(stack: Stack, reset: str, edge: float = 0.0) -> bool:
    """Whether no float64 membrane comes within 1e-5 of its threshold, or of ``edge`` above or below it, where a
    surrogate's support ends; float32 membranes are wrong by 1e-6."""
    return stack.margin(reset, edge) >= 1e-5


def clear_stacks(cases, steps: int | None, reset: str = "subtract", edge: float = 0.0, **options) -> Iterator[Stack]:
    """Draws in which float32 rounding cannot change a spike, so that gradients are comparable."""
    draws = (Stack(cases, steps, seed=1000 * k, **options) for k in itertools.count())
    return (stack for stack in draws if clear_of_thresholds(stack, reset, edge))


def clear_stack(cases, steps: int | None, reset: str = "subtract", **options) -> Stack:
    """The first of them."""
    return next(clear_stacks(cases, steps, reset, **options))


#: α, and the share of layer 1 to which a gradient comes at least under a surrogate with compact support
SHARES = {2e5: 0.0, 20.0: 0.05, 2.0: 0.25, 0.01: 0.99}


def check_compact(backend: str, cases, surrogate: str, alpha: float, steps: int | None, batch: int) -> None:
    """Gradients are those of float64 whether no neuron passes one on or all do. One β per layer, so that the CPU
    kernels take events where these are few; few units, so that rows of them are empty."""
    options = {"per_neuron": False, "batch": batch, "p_intra": 0.4, "p_inter": 0.04}
    stack = clear_stack(cases, steps, edge=1 / alpha, **options)
    assert any((mask.to_dense().sum(1) == 0).any() for mask in stack.masks)
    exact = stack.run(torch.float64, "torch", surrogate=surrogate, alpha=alpha)
    share = (exact["bias0.grad"] != 0).double().mean()
    assert share == 0 if SHARES[alpha] == 0 else share >= SHARES[alpha]
    for name, actual in stack.run(torch.float32, backend, surrogate=surrogate, alpha=alpha).items():
        if name.startswith(("spikes", "counts")):
            assert torch.equal(actual.double(), exact[name]), name
        else:
            # float32 rounding of membranes, times α
            assert rms(actual - exact[name]) <= max(1e-4, 1e-5 * alpha) * rms(exact[name]), name
