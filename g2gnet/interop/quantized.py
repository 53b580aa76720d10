"""Networks in integers: weights of eight or four bits, inputs of nine, membranes of 32 in fixed point, exactly as the C
file of :func:`g2gnet.interop.to_c` computes them.

Let Q = 2^(bits − 1) − 1. In each population, membranes count units q and

- a weight from other populations is w ≈ s·w̄, |w̄| ≤ Q, one s for all of them, and q = s·2⁻ᶠ: what arrives is Σ w̄ · 2ᶠ.
  f, at most 16, is such that the threshold is at least 2¹⁴ units. A population that only the input reaches has
  q = θ·2⁻¹⁴.
- a weight from the input has an s of its own, and an input is x ≈ s_x·x̄: what arrives is (Σ w̄·x̄ · m + 2ᵏ⁻¹) >> k,
  with m·2⁻ᵏ ≈ s·s_x/q of 15 bits, but k ≤ 31.
- biases, thresholds and what a spike adds to the adaptation are rounded to units; a decay, and the coupling of the
  adaptation to the membrane, is c ≈ c̄·2⁻¹⁵: c·U is (U·c̄ + 2¹⁴) >> 15.
- a state that would leave ±(2³⁰ − 1) stays there.

s is the scale with the least squared error of the weights among 15 shares of that of the largest one
(:func:`g2gnet.weights.few_bits.scale_of`). A network that computes with weights of so few bits already
(``net.quantize``) keeps them.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels.numbers import Number
from g2gnet.encoding import as_samples
from g2gnet.interop.plain import PlainConnection, PlainNetwork, plain
from g2gnet.spiking_network import SpikingNetwork
from g2gnet.weights.few_bits import check_bits, largest_of, scale_of

#: the largest integer input
LARGEST_INPUT = 255
#: states stay within ± this
LARGEST = 2**30 - 1
#: bits behind the point of a decay
DECAY_BITS = 15
#: bits of the largest threshold, at least
THRESHOLD_BITS = 14
_SCALE = Number(0, open_low=True)


class IntegerPopulation(NamedTuple):
    """The integers of a population: parameters by name and biases, int64; f; and m and k of its inputs; the real value
    of a unit."""

    parameters: dict[str, np.ndarray]
    bias: np.ndarray
    left: int
    multiplier: int
    right: int
    unit: float


class IntegerNetwork(NamedTuple):
    """``plain``, the network that was rounded; its integers: of populations, and of the weights of each connection,
    int64; the bits of a weight; and s_x."""

    plain: PlainNetwork
    populations: tuple[IntegerPopulation, ...]
    weights: tuple[np.ndarray, ...]
    bits: int
    input_scale: float

    def inputs(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples as integers x̄, int64 of the same shape. Raises ValueError if one is not finite."""
        if not samples.isfinite().all():
            raise ValueError("a sample is not finite everywhere; replace its NaN and infinite values")
        scaled = samples.double() / self.input_scale
        return scaled.round().clamp(-LARGEST_INPUT, LARGEST_INPUT).long()


class Step(NamedTuple):
    """After one step: of each population spikes, bool [B, N], and membranes, int64 [B, N]."""

    spikes: list[torch.Tensor]
    membranes: list[torch.Tensor]


def in_integers(of: PlainNetwork, bits: int, input_scale: float) -> IntegerNetwork:
    """Rounds a network to weights of ``bits`` bits and integer inputs that count ``input_scale`` each."""
    check_bits("bits", bits)
    _SCALE.check("input_scale", input_scale)
    largest = largest_of(bits)
    weights: list[np.ndarray] = [np.zeros(0, np.int64)] * len(of.connections)
    populations = []
    for number, population in enumerate(of.populations):
        to = [(at, each) for at, each in enumerate(of.connections) if each.target == number]
        of_input = [(at, each) for at, each in to if each.source < 0]
        of_others = [(at, each) for at, each in to if each.source >= 0]
        groups = [[torch.from_numpy(each.weights) for _, each in group] for group in (of_input, of_others)]
        scales = [float(scale_of(group, bits)) if group else 1.0 for group in groups]
        for group, scale in zip((of_input, of_others), scales, strict=True):
            for at, each in group:
                weights[at] = np.clip(np.rint(each.weights / scale), -largest, largest).astype(np.int64)
        threshold = float(np.abs(population.parameters["threshold"]).max()) or 1.0
        left = 0
        if of_others:
            left = min(16, max(0, math.ceil(THRESHOLD_BITS - math.log2(threshold / scales[1]))))
            unit = scales[1] * 2.0**-left
        else:
            unit = threshold * 2.0**-THRESHOLD_BITS
        bias = population.bias.copy()
        most = np.zeros(population.size)
        for at, each in of_input:
            bias += of.offset * scales[0] * np.bincount(each.targets, weights[at], population.size)
            most += LARGEST_INPUT * np.bincount(each.targets, np.abs(weights[at]), population.size)
        ratio = scales[0] * input_scale * of.scale / unit if of_input else 0.0
        right = min(31, max(0, DECAY_BITS - 1 - math.floor(math.log2(abs(ratio))))) if ratio else 0
        multiplier = round(ratio * 2.0**right)
        if max(np.max(most), abs(multiplier)) > LARGEST:
            raise ValueError(
                f"{population.name}: its inputs are too large for 32 bits; give fewer bits, or export floats"
            )
        parameters = {}
        for name, values in population.parameters.items():
            scaled = values / unit if name in ("threshold", "b") else values * 2.0**DECAY_BITS
            parameters[name] = _rounded(f"{population.name}.{name}", scaled)
        populations.append(
            IntegerPopulation(
                parameters,
                _rounded(f"the biases of {population.name}", bias / unit),
                left,
                multiplier,
                right,
                unit,
            )
        )
    return IntegerNetwork(of, tuple(populations), tuple(weights), bits, input_scale)


def _rounded(name: str, values: np.ndarray) -> np.ndarray:
    integers = np.rint(values)
    if not (np.abs(integers) <= LARGEST).all():
        raise ValueError(
            f"{name}: a value is too large beside the thresholds for 32 bits; scale the network, or export floats"
        )
    return integers.astype(np.int64)


def input_scale_of(net: SpikingNetwork, calibration: Any) -> float:
    """s_x: 1/255 for samples of bytes, 1 for whole numbers, and else the largest sample over 255."""
    trained_on = getattr(net, "trained_on", None)
    if calibration is None:
        if trained_on is not None and trained_on.kind == "uint8":
            return 1 / 255
        raise ValueError(
            "the largest input is unknown; give calibration=samples, or input_scale, what an input of 1 is"
        )
    given = torch.as_tensor(calibration)
    if not given.numel():
        raise ValueError(f"calibration is {list(given.shape)}, without a number; give samples, or input_scale")
    if given.dtype == torch.uint8:
        return 1 / 255
    samples = as_samples(calibration).abs()
    most = float(samples.max())
    if not math.isfinite(most):
        raise ValueError("calibration is not finite everywhere; replace its NaN and infinite values")
    whole = most <= LARGEST_INPUT and torch.equal(samples, samples.round())
    return 1.0 if whole or not most else most / LARGEST_INPUT


def steps_of(net: IntegerNetwork, inputs: torch.Tensor) -> Iterator[Step]:
    """Runs a network on integer samples [B, D] or [B, T·D], and gives each step."""
    of = net.plain
    batch = len(inputs)
    if not of.held:
        order = torch.arange(of.steps * of.inputs) if of.order is None else torch.from_numpy(of.order).flatten()
        sequence = inputs[:, order].view(batch, of.steps, of.inputs)
    matrices = []
    for each, weights in zip(of.connections, net.weights, strict=True):
        places = torch.from_numpy(np.stack([each.targets, each.sources]))
        shape = of.populations[each.target].size, len(each.delays)
        numbers = torch.from_numpy(weights).double()
        matrices.append(torch.sparse_coo_tensor(places, numbers, shape, check_invariants=False).coalesce())
    # what arrives at every step from an input that is held
    constant = {
        at: (matrices[at] @ inputs.double()[:, np.arange(len(each.delays)) % of.inputs].T).T.long()
        for at, each in enumerate(of.connections)
        if of.held and each.source < 0 and not each.delays.any()
    }
    zeros = [torch.zeros(batch, each.size, dtype=torch.int64) for each in of.populations]
    second, membranes = list(zeros), list(zeros)
    # what each sent, the last step first
    reach = 1 + max((int(each.delays.max(initial=0)) for each in of.connections), default=0)
    sent = [[torch.zeros(batch, each.size, dtype=torch.float64) for _ in range(reach)] for each in of.populations]
    sent.append([torch.zeros(batch, of.inputs, dtype=torch.float64) for _ in range(reach)])
    for t in range(of.steps):
        sent[-1].insert(0, (inputs if of.held else sequence[:, t]).double())
        spikes = []
        for number, (population, own) in enumerate(zip(of.populations, net.populations, strict=True)):
            of_input, of_others = zeros[number], zeros[number]
            for at, each in enumerate(of.connections):
                if each.target == number:
                    arrives = constant.get(at)
                    if arrives is None:
                        arrives = (matrices[at] @ _delayed(each, sent[each.source], number, of.inputs).T).T.long()
                    if each.source < 0:
                        of_input = of_input + arrives
                    else:
                        of_others = of_others + arrives
            half = (1 << own.right) >> 1
            always = torch.from_numpy(own.bias) + ((of_input * own.multiplier + half) >> own.right)
            current = _within(always) + (of_others << own.left)
            second[number], membranes[number] = _charge(
                population.model, population.reset, own.parameters, _within(current), second[number], membranes[number]
            )
            threshold = torch.from_numpy(own.parameters["threshold"])
            fired = membranes[number] > threshold
            if number == of.output and of.readout != "counts":
                fired = torch.zeros_like(fired)
            spikes.append(fired)
            sent[number].insert(0, fired.double())
        for history in sent:
            history.pop()
        yield Step(spikes, list(membranes))


def _delayed(connection: PlainConnection, history: list[torch.Tensor], target: int, inputs: int) -> torch.Tensor:
    """What arrives now: [B, N_src]. A population that runs after the target has not sent in this step yet."""
    late = 1 if 0 <= target <= connection.source else 0
    places = np.arange(len(connection.delays)) % history[0].shape[1]
    arrives = history[0][:, places].clone()
    for delay in np.unique(connection.delays):
        chosen = np.flatnonzero(connection.delays == delay)
        arrives[:, chosen] = history[delay - late][:, places[chosen]]
    return arrives


def _within(state: torch.Tensor) -> torch.Tensor:
    return state.clamp(-LARGEST, LARGEST)


def _times(state: torch.Tensor, factor: np.ndarray) -> torch.Tensor:
    return (state * torch.from_numpy(factor) + (1 << DECAY_BITS - 1)) >> DECAY_BITS


def _charge(
    model: str,
    reset: str,
    parameters: dict[str, np.ndarray],
    current: torch.Tensor,
    second: torch.Tensor,
    u: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of :data:`g2g_kernels.ops.neurons.MODELS` in integers."""
    theta = torch.from_numpy(parameters["threshold"])
    fired = u > theta
    if model == "synaptic":
        second = _within(_times(second, parameters["syn_decay"]) + current)
        u = _times(u, parameters["beta"]) + second
        if reset == "zero":
            return second, _within(u.masked_fill(fired, 0))
    else:
        if reset == "zero":
            u = u.masked_fill(fired, 0)
        if model == "adlif":
            added = _times(second, parameters["adapt_decay"]) + _times(u, parameters["a"])
            second = _within(added + fired * torch.from_numpy(parameters["b"]))
            current = current - second
        u = _times(u, parameters["beta"]) + current
    return second, _within(u - fired * theta if reset == "subtract" else u)


class QuantizedNetwork(torch.nn.Module):
    """A network in integers, for evaluation: :func:`quantize`.

    Attributes:
        integers: its numbers (:class:`IntegerNetwork`).

    Example:
        >>> from g2gnet import G2GNet
        >>> in_bits = quantize(G2GNet(64, 32, 10, block_size=4, T=5), bits=4, input_scale=1 / 255)
        >>> in_bits.of_integers(torch.randint(256, (3, 64))).dtype
        torch.int64
    """

    def __init__(self, integers: IntegerNetwork) -> None:
        super().__init__()
        self.integers = integers

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples [B, …] as the network was trained on, floats from 0 to 1 or bytes → int64 [B, C]: the output's spike
        counts, or its readout in units of its membranes."""
        return self.of_integers(self.integers.inputs(as_samples(samples)))

    def of_integers(self, inputs: torch.Tensor) -> torch.Tensor:
        """Integer samples [B, D] or [B, T·D] from −255 to 255 → [B, C], as :meth:`forward` gives it. Raises
        ValueError for others."""
        of, answer = self.integers.plain, None
        values = of.inputs if of.held else of.inputs * of.steps
        if inputs.dim() != 2 or inputs.shape[1] != values:
            raise ValueError(f"samples are {list(inputs.shape)}; this network takes [B, {values}]")
        if (inputs.abs() > LARGEST_INPUT).any():
            raise ValueError(f"an integer input is beyond ±{LARGEST_INPUT}; clip it, as `inputs` does with samples")
        for step in steps_of(self.integers, inputs):
            now = step.spikes[of.output].long() if of.readout == "counts" else step.membranes[of.output]
            if answer is None or of.readout == "last":
                answer = now
            else:
                answer = torch.maximum(answer, now) if of.readout == "max" else answer + now
        assert answer is not None
        return answer.div(of.steps, rounding_mode="trunc") if of.readout == "mean" else answer


def quantize(
    net: SpikingNetwork,
    bits: int = 8,
    calibration: Any = None,
    *,
    input_scale: float | None = None,
    held: bool | None = None,
) -> QuantizedNetwork:
    """The network in integers, as :func:`g2gnet.interop.to_c` writes it: equal spikes, bit for bit.

    Args:
        net: evaluated as it is now; training it on does not change what is returned.
        bits: of a weight, 8 or 4.
        calibration: samples as :meth:`G2GNet.predict` takes them, whose kind says what an integer input is: bytes
            count 1/255 each, whole numbers themselves, others their largest over 255. None: a network that was trained
            on bytes says so itself.
        input_scale: the value of an integer input of 1, instead.
        held: whether a sample [D] is held for all steps, or has T·D values; None: as the network's samples are.

    Raises ValueError for other bits, unknown inputs, and what :func:`to_c` refuses.

    Example:
        >>> from g2gnet import G2GNet
        >>> net = quantize(G2GNet(64, 32, 10, block_size=4, T=5), calibration=torch.rand(20, 64))
        >>> net(torch.rand(3, 64)).shape
        torch.Size([3, 10])
    """
    of = plain(net, held)
    scale = input_scale_of(net, calibration) if input_scale is None else input_scale
    return QuantizedNetwork(in_integers(of, bits, scale))
