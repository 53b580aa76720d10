"""Gradients of drawn calls, on every instruction set of this CPU, against float64."""

import itertools
import os
import random

import pytest
import torch
from compiled_kernels import instruction_set

from g2g_kernels import BlockMask, GroupLayout, Neurons, SpikingLayer, available_backends, g2g_linear, g2g_stack, lif
from g2g_kernels.cpu.library import ISAS

DRAWS = 8  # of each operator and instruction set, other ones every day
RESETS, SURROGATES = ("subtract", "zero", "none"), ("atan", "fast_sigmoid", "sigmoid", "triangle")


def draw_mask(draw, generator, in_size=None):
    out_size, in_size = draw.randint(1, 90), in_size or draw.randint(1, 90)
    groups = draw.randint(1, min(out_size, in_size, 6))
    kinds = "index", "interleaved", "random"
    layouts = [GroupLayout(size, groups, draw.choice(kinds), generator) for size in (out_size, in_size)]
    return BlockMask.sample(*layouts, draw.random(), draw.random(), draw.choice((1, 2, 5, 16, 64)), generator)


def draw_parameters(draw, generator, size):
    shape = (size,) if draw.random() < 0.5 else ()
    return 0.5 + 0.6 * torch.rand(shape, generator=generator), 0.3 + torch.rand(shape, generator=generator)


def linear_call(draw, generator):
    mask = draw_mask(draw, generator)
    x = torch.randn(draw.randint(1, 70), mask.shape[1], generator=generator)
    if draw.random() < 0.5:
        x = (x > 1).float()  # spikes
    values = torch.randn(mask.num_units, *mask.unit_shape, generator=generator) * mask.valid()
    bias = torch.randn(mask.shape[0], generator=generator)
    return (x, values, bias), lambda backend, x, values, bias: (g2g_linear(x, values, mask, bias, backend=backend),)


def lif_call(draw, generator):
    steps = draw.randint(1, 12) if draw.random() < 0.5 else None
    shape = (draw.randint(1, 9), draw.randint(1, 70))
    current = torch.randn(shape if steps else (draw.randint(1, 12), *shape), generator=generator)
    options = steps, draw.choice(RESETS), draw.choice(SURROGATES), draw.uniform(0.5, 4)
    parameters = draw_parameters(draw, generator, shape[-1])
    return (current, *parameters), lambda backend, *tensors: (lif(*tensors, *options, backend=backend),)


def stack_call(draw, generator):
    held = draw.random() < 0.5
    steps, batch = draw.randint(1, 9), draw.randint(1, 9)
    masks, size = [], None
    for _ in range(draw.randint(1, 3)):
        masks.append(draw_mask(draw, generator, size))
        size = masks[-1].shape[0]
    options = draw.choice(RESETS), draw.choice(SURROGATES), draw.uniform(0.5, 4)
    tensors = [
        torch.rand((batch, masks[0].shape[1]) if held else (steps, batch, masks[0].shape[1]), generator=generator)
    ]
    for mask in masks:
        scale = 3 / max(1.0, mask.density * mask.shape[1]) ** 0.5
        tensors += [torch.randn(mask.num_units, *mask.unit_shape, generator=generator) * scale * mask.valid()]
        tensors += [torch.rand(mask.shape[0], generator=generator), *draw_parameters(draw, generator, mask.shape[0])]

    def run(backend, x, *rest):
        layers = [
            SpikingLayer(values, mask, bias, Neurons("lif", (beta, theta), *options))
            for mask, values, bias, beta, theta in zip(masks, *(rest[i::4] for i in range(4)), strict=True)
        ]
        activity = g2g_stack(x, layers, steps if held else None, backend=backend)
        return activity.counts, *activity.rates

    return tensors, run


def results(run, backend, tensors, dtype):
    """Outputs, and the gradients of a weighted sum of them."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    outputs = run(backend, *leaves)
    loss = sum(
        (output * torch.linspace(-1, 2, output.numel()).to(dtype).view(output.shape)).sum() for output in outputs
    )
    return [output.detach() for output in outputs], torch.autograd.grad(loss, leaves)


def compare(seed):
    """How many draws were compared, how many a rounded spike spoiled, and the largest error, as a part of the bound."""
    compared, spoiled, worst = 0, 0, (0.0, "")
    for call in (linear_call, lif_call, stack_call):
        for number in range(DRAWS):
            name = f"{call.__name__} {seed} {number} {os.environ['G2G_CASES']}"
            draw = random.Random(name)
            tensors, run = call(draw, torch.Generator().manual_seed(draw.randrange(1 << 30)))
            outputs, gradients = results(run, "cpu", tensors, torch.float32)
            exact_outputs, exact = results(run, "torch", tensors, torch.float64)
            if call is not linear_call and not all(
                torch.allclose(a.double(), b, rtol=0, atol=1e-6) for a, b in zip(outputs, exact_outputs, strict=True)
            ):
                spoiled += 1
                continue
            compared += 1
            plain = itertools.chain(*results(run, "torch", tensors, torch.float32))
            for actual, of_torch, expected in zip((*outputs, *gradients), plain, (*exact_outputs, *exact), strict=True):
                size = max(expected.norm().item(), 1.0)  # a small sum is what terms of about 1 leave
                error, plain_error = ((each.double() - expected).norm().item() / size for each in (actual, of_torch))
                worst = max(worst, (error / max(1e-4, 3 * plain_error), name))
    return compared, spoiled, *worst


@pytest.mark.skipif("cpu" not in available_backends(), reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_of_random_calls_are_those_of_float64(isa, tmp_path):
    """Draws of every operator; of those in which rounding flips a spike there may be a few."""
    with instruction_set(isa, tmp_path):
        compared, spoiled, error, name = compare(ISAS.index(isa))
    assert compared >= 2.8 * DRAWS
    assert spoiled <= 0.2 * DRAWS
    assert error < 1, f"{name}: {error:.1e}"
