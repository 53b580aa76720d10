"""Errors of all gradients at M = T·B = 12,800, as ratios to plain PyTorch's: a table of ``triton/CHECKS.md``.

``python tests/gradient_errors.py`` writes it, with the Python of the environment that ``tests/execute_kernels.sh``
makes. Kernels are executed from the IR, where a float32 product adds one multiply-add after the other as on a card.
"""

import contextlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from helpers import ErrorRatios, MaskCase, device_of
from kernel_execution import CAPABILITY, compile_and_parse_once
from linear_cases import backend_result, dense_result, inputs
from neuron_cases import clear_of_threshold, currents, gradients, lif_on, output_weights
from stack_cases import MIXER, SIZES, Stack, chain, rounded
from ttsem import sanitize

from g2g_kernels.ops.g2g_stack import triton as stacks

PAGE = Path(__file__).parents[1] / "g2g_kernels/triton/CHECKS.md"
T, B = 50, 256
#: units of one, two and four tiles of 16
LINEAR = (
    MaskCase(16, 16, 1, "index", "index", 16), MaskCase(108, 140, 3, "index", "random", 32),
    MaskCase(150, 290, 2, "random", "interleaved", 64),
)  # fmt: skip
#: ragged units in several groups; one unit a layer
STACKS = chain(SIZES, 2, 16, *MIXER), chain((16, 16, 16, 10), 1, 16, "index index")
#: draws of parameters: more where they are single numbers, whose errors scatter
DRAWS = {"per neuron": 4, "per layer": 16}

Added = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]


def autocast(backend: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device_of(backend), dtype) if dtype != torch.float32 else contextlib.nullcontext()


def linear(dtype: torch.dtype, add: Added) -> None:
    for seed, case in itertools.product(range(2), LINEAR):
        mask = case.mask(p_inter=0.15, p_intra=1.0 if case.groups == 1 else 0.3, seed=seed)
        x, values, bias = inputs(mask, T * B)
        grad_output = torch.randn(T * B, mask.shape[0], generator=torch.Generator().manual_seed(seed))
        exact, results = dense_result(mask, x, values, bias, grad_output), {}
        for backend in ("triton", "torch"):
            with autocast(backend, dtype):
                results[backend] = backend_result(mask, x, values, bias, grad_output, backend)
        for name in ("x", "values", "bias"):
            add(name, *(each[f"{name}.grad"] for each in (*results.values(), exact)))


def lif(dtype: torch.dtype, add: Added) -> None:
    for which, draws in DRAWS.items():
        for seed in range(draws):
            current, neurons = currents(T, B, 16, seed=seed).to(dtype), 16 if which == "per neuron" else 1
            draw = torch.Generator().manual_seed(seed)
            beta, threshold = (low + 0.3 * torch.rand(neurons, generator=draw) for low in (0.7, 0.6))
            clear = clear_of_threshold(current, beta, threshold, "subtract")
            tensors = current, beta, threshold, (output_weights(T, B, 16) * clear).to(dtype)
            exact = gradients(lif_on("torch"), *(tensor.double() for tensor in tensors))
            results = [gradients(lif_on(backend), *tensors) for backend in ("triton", "torch")]
            for name, what in (("current", ""), ("beta", f", {which}"), ("threshold", f", {which}")):
                add(name + what, *(each[f"{name}.grad"] for each in (*results, exact)))


def drawn(which: str, dtype: torch.dtype) -> Iterator[tuple[Stack, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Stacks whose spikes rounding does not change; their exact gradients and plain PyTorch's."""
    for seed in itertools.count():
        # the larger ones take most of the time
        cases = STACKS[seed % 2 if which == "per neuron" else 1]
        stack = Stack(cases, T, per_neuron=which == "per neuron", seed=1000 * seed, batch=B)
        rounded(stack, dtype)
        exact = stack.run(torch.float64, "torch")
        with autocast("torch", dtype):
            plain = stack.run(torch.float32, "torch")
        if all(torch.equal(plain[name].double(), exact[name]) for name in exact if name.startswith("spikes")):
            yield stack, exact, plain


def stack(fused: bool) -> Callable[[torch.dtype, Added], None]:
    def measure(dtype: torch.dtype, add: Added) -> None:
        for which, draws in DRAWS.items():
            for of, exact, plain in itertools.islice(drawn(which, dtype), draws):
                with autocast("triton", dtype), stacks.choose(fused):
                    actual = of.run(torch.float32, "triton")
                for name, expected in exact.items():
                    if name.startswith("spikes"):
                        assert torch.equal(actual[name].double(), expected), name
                    elif name.endswith(".grad"):
                        leaf = name.removesuffix(".grad")
                        tensor = leaf.rstrip("012")
                        what = f", {which}" if tensor in ("beta", "threshold") else ""
                        what += {"x": "", f"{tensor}2": ", last layer"}.get(leaf, ", hidden layers")
                        add(tensor + what, actual[name], plain[name], expected)

    return measure


OPERATORS = {
    "`g2g_linear`": linear,
    "`lif`": lif,
    "`g2g_stack`, pair": stack(fused=False),
    "`g2g_stack`, fused": stack(fused=True),
}


def main() -> None:
    compile_and_parse_once()
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    with sanitize.session(CAPABILITY, races="off"):
        for operator, measure in OPERATORS.items():
            for dtype in (torch.float32, torch.bfloat16):
                ratios = ErrorRatios()
                measure(dtype, ratios.add)
                for name, (ratio, cases) in ratios.means().items():
                    cells = rows[operator, name]
                    cells += [str(cases), f"{ratio:.2f}"] if not cells else [f"{ratio:.2f}"]
                    print(operator, dtype, name, *cells, flush=True)
    names = {"x": "x", "current": "I", "values": "weights", "bias": "bias", "beta": "β", "threshold": "θ"}
    lines = ["| operator | gradient of | cases | float32 | bfloat16 |", "| --- | --- | --- | --- | --- |"]
    for (operator, name), cells in rows.items():
        tensor, comma, which = name.partition(",")
        lines.append(f"| {' | '.join([operator, names[tensor] + comma + which, *cells])} |")
    text = PAGE.read_text(encoding="utf-8")
    part = re.compile(r"(?<=<!-- drawn: gradient errors -->\n).*?(?=<!-- end -->)", re.DOTALL)
    PAGE.write_text(part.sub(lambda _: "\n" + "\n".join(lines) + "\n\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
