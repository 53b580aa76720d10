"""The judge's own computation: the formulas in plain PyTorch, in float64, differentiated by autograd.

It shares no code with :mod:`g2g_kernels` (from a mask it only reads which weight is in which unit) or with any peer:
dense weights, one loop over time, each surrogate as the derivative of a smooth step. The batch is processed in pieces,
since samples only meet in sums; this keeps the graph over all time steps small. The weights of a network of more than
``DENSE_UP_TO`` neurons in a layer, which would not fit as dense ones, are multiplied unit by unit.

A run may be given spikes: they are what layers receive and what resets, whatever the membranes say, and the surrogate
is taken at these membranes. So what follows from a contender's spikes is known up to rounding.

β and θ are per neuron here, so their gradients are the terms whose sum is the gradient of a shared β or θ.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional as F

from g2g_kernels import BlockMask

from .workload import NeuronInputs, Prepared, Workload

#: named tensors; of a network "loss", "counts" [B, C] and the gradients "fc1.weight" [out, in] … "lif3.threshold", of a
#: recurrent one also "rec1.weight" [N, N] and "rec2.weight", all weights packed where the network :func:`is_wide`; of
#: neurons alone the gradients "current" [T, B, N] and of the parameters by name, of a product alone "y"
#: [T, B, out] and the gradients "x", "weight" and "bias", of an update what :func:`update_results` says
Results = dict[str, torch.Tensor]

#: the spikes of a network's layers
SPIKES = ("lif1.spikes", "lif2.spikes", "lif3.spikes")


class Run(NamedTuple):
    """What a computation gives."""

    results: Results  # loss, counts and gradients
    spikes: Results  # of each layer by name, bool [T, B, N]
    #: of each layer by the same name, [B, 2]: how many spikes of each sample are not on their membrane's side of the
    #: threshold, and |U − θ| of the farthest of these; without given spikes there are none
    denied: Results


ATAN_ALPHA = 2.0  # of neurons that are given no other surrogate
CHUNK = 32  # samples in a piece
DENSE_UP_TO = 4096  # neurons of a layer, whose weights are 134 MB in float64
UPDATE_FRACTION = 0.1  # share of a layer's units that an update replaces
#: precisions: "float64" is the truth; "fp32" and "bf16" (products in bfloat16) show what rounding alone does to it
DTYPES = {"float64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


def is_wide(workload: Workload) -> bool:
    """Whether dense weights of its network, at H 65,536 34 GB in float64, are too large to be formed."""
    return workload.hidden_dim > DENSE_UP_TO


def _smooth_step(x: torch.Tensor, surrogate: str, alpha: float) -> torch.Tensor:
    """The function whose derivative is the surrogate."""
    if surrogate == "atan":
        return torch.atan(math.pi / 2 * alpha * x) / math.pi
    if surrogate == "triangle":
        inside = (alpha * x).clamp(-1, 1)
        return inside - inside * inside.abs() / 2
    raise ValueError(f"surrogate={surrogate!r} is not measured; choose atan or triangle")


def _lif(
    currents: list[torch.Tensor],
    beta: torch.Tensor,
    theta: torch.Tensor,
    reset: str,
    surrogate: str = "atan",
    alpha: float = ATAN_ALPHA,
    recurrent: Callable[[torch.Tensor], torch.Tensor] | None = None,
    given: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The spikes for a list of currents, one per time step, to which ``recurrent`` adds a product of the last spikes.

    ``"after decay"``: U_t = β·U_{t−1} + I_t − θ·R_t, as snnTorch and g2g have it; ``"before decay"``:
    U_t = β·(U_{t−1} − θ·R_t) + I_t, as SpikingJelly has it. No gradient passes through R.

    With ``given``, bool [T, B, N], a neuron spikes and is reset where this says so, wherever its membrane is; its
    surrogate is that of the membrane. Besides the spikes it returns :attr:`Run.denied`.
    """
    decay = beta.clamp(0, 1)
    taken = theta if reset == "after decay" else decay * theta
    membrane = torch.zeros_like(currents[0])
    spikes: list[torch.Tensor] = []
    denied = currents[0].new_zeros(len(currents[0]), 2, dtype=torch.float64)
    fired = torch.zeros_like(membrane, dtype=torch.bool)
    for step, current in enumerate(currents):
        if recurrent is not None and spikes:
            current = current + recurrent(spikes[-1])
        membrane = decay * membrane + current - taken * fired
        above = membrane - theta
        fired = above > 0 if given is None else given[step]
        far = above.detach().abs().where(fired != (above > 0), 0)
        number, farthest = denied.unbind(1)
        denied = torch.stack([number + far.count_nonzero(1), torch.maximum(farthest, far.amax(1))], 1)
        smooth = _smooth_step(above, surrogate, alpha)
        spikes.append(fired.to(smooth.dtype) + (smooth - smooth.detach()))  # its value, with the other's derivative
    return spikes, denied


def _filtered(currents: list[torch.Tensor], syn_decay: torch.Tensor) -> list[torch.Tensor]:
    """The synaptic currents C_t = γ·C_{t−1} + I_t for a list of currents, one per time step."""
    synaptic_currents, before = [], torch.zeros_like(currents[0])
    for current in currents:
        before = syn_decay.clamp(0, 1) * before + current
        synaptic_currents.append(before)
    return synaptic_currents


def _parameters(prepared: Prepared, dtype: torch.dtype, packed: bool = False) -> dict[str, torch.Tensor]:
    """Copies of the network's parameters by the names of :data:`Results`, weights dense or packed."""
    net, found = prepared.network("torch"), {}
    for name, connection in net.connections().items():
        found[f"{name}.weight"] = connection.values if packed else connection.dense_weight()
        if connection.bias is not None:
            found[f"{name}.bias"] = connection.bias
    for number, (connection, neurons) in enumerate(net.layers(), 1):
        each = neurons.by_name.items()
        found |= {f"lif{number}.{name}": value.expand(connection.out_features) for name, value in each}
    return {name: tensor.detach().to(dtype, copy=True).requires_grad_() for name, tensor in found.items()}


def _by_units(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` of [..., in] and the weight of packed ``values``: a product for each unit, added up by block row."""
    rows, cols = mask.rows, mask.cols
    places = F.pad(x, (0, 1)).index_select(-1, cols.neuron_at)  # zero where there is no neuron
    ranges = places.view(-1, cols.num_units, cols.width).transpose(0, 1)
    products = ranges.index_select(0, mask.unit_col.long()) @ values.mT  # [num_units, samples, unit rows]
    sums = x.new_zeros(rows.num_units, products.shape[1], rows.width)
    sums = sums.index_add(0, mask.unit_row.long(), products.to(x.dtype)).transpose(0, 1).flatten(1)
    y = sums.index_select(1, rows.place_of).view(*x.shape[:-1], rows.size)
    return y if bias is None else y + bias


def _simulate(
    images: torch.Tensor,
    parameters: dict[str, torch.Tensor],
    workload: Workload,
    reset: str,
    precision: str,
    masks: Mapping[str, BlockMask] | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[list[torch.Tensor]], Results]:
    """The spikes of the three layers, one [B, N] per time step, and what membranes deny of the ``given`` ones; of
    packed weights if their ``masks`` are given."""

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = F.linear(x, weight, bias) if masks is None else _by_units(x, weight, masks[name], bias)
        return y.to(DTYPES[precision])

    currents = [product("fc1", images)] * workload.T
    layers, denied = [], {}
    for number in (1, 2, 3):
        surrogate = (workload.surrogate, workload.alpha) if number < 3 else ("atan", ATAN_ALPHA)
        beta, theta = parameters[f"lif{number}.beta"], parameters[f"lif{number}.threshold"]
        name, joined = SPIKES[number - 1], f"rec{number}.weight" in parameters
        recurrent = functools.partial(product, f"rec{number}") if joined else None
        spikes, denied[name] = _lif(currents, beta, theta, reset, *surrogate, recurrent, given[name] if given else None)
        layers.append(spikes)
        if number < 3:
            currents = list(product(f"fc{number + 1}", torch.stack(spikes)))
    return layers, denied


def _in_pieces(
    consume: Callable[[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]], None],
    prepared: Prepared,
    parameters: dict[str, torch.Tensor],
    reset: str,
    precision: str,
    given: Results | None,
    samples: torch.Tensor | None = None,
    masks: Mapping[str, BlockMask] | None = None,
    size: int = CHUNK,
) -> tuple[Results, Results]:
    """Spikes and denied ones of ``samples`` of the batch (None: all), ``size`` of them at a time: ``consume`` gets the
    images, the labels and the layers' spikes of each piece."""
    trains, denied = [], []
    for piece in (torch.arange(len(prepared.labels)) if samples is None else samples).split(size):
        images, here = (
            prepared.images[piece].to(DTYPES[precision]),
            given and {n: s[:, piece] for n, s in given.items()},
        )
        layers, denied_here = _simulate(images, parameters, prepared.workload, reset, precision, masks, here)
        consume(images, prepared.labels[piece], layers)
        trains.append({name: torch.stack(each).detach() > 0.5 for name, each in zip(SPIKES, layers, strict=True)})
        denied.append(denied_here)
    spikes = {name: torch.cat([piece[name] for piece in trains], 1) for name in SPIKES}
    return spikes, {name: torch.cat([piece[name] for piece in denied]) for name in SPIKES}


def network_results(
    prepared: Prepared,
    reset: str = "after decay",
    precision: str = "float64",
    given: Results | None = None,
    samples: torch.Tensor | None = None,
) -> Run:
    """Loss, spike counts and gradients of the workload's network on its batch; with ``samples``, the counts of these
    and what they add to loss and gradients."""
    masks, size, hidden = None, CHUNK, prepared.workload.hidden_dim
    if is_wide(prepared.workload):
        masks = {name: connection.mask for name, connection in prepared.network("torch").connections().items()}
        size = max(1, 2 * CHUNK * DENSE_UP_TO // hidden)
    parameters = _parameters(prepared, DTYPES[precision], packed=masks is not None)
    loss, counts = torch.zeros((), dtype=DTYPES[precision]), []

    def learn(images: torch.Tensor, labels: torch.Tensor, layers: list[list[torch.Tensor]]) -> None:
        count = torch.stack(layers[-1]).sum(0)
        piece = F.cross_entropy(count, labels, reduction="sum") / len(prepared.labels)
        piece.backward()
        loss.add_(piece.detach())
        counts.append(count.detach())

    of_spikes = _in_pieces(learn, prepared, parameters, reset, precision, given, samples, masks, size)
    gradients = {name: tensor.grad for name, tensor in parameters.items() if tensor.grad is not None}
    return Run({"loss": loss, "counts": torch.cat(counts), **gradients}, *of_spikes)


def neuron_results(
    inputs: NeuronInputs, reset: str = "after decay", precision: str = "float64", given: Results | None = None
) -> Run:
    """Gradients of neurons alone: LIF, or synaptic where there is a γ among the parameters."""
    dtype, shape = DTYPES[precision], inputs.current.shape
    parameters = {
        name: value.to(dtype).expand(shape[-1]).clone().requires_grad_() for name, value in inputs.parameters.items()
    }
    spikes, gradient, denied = torch.empty(shape, dtype=torch.bool), torch.empty(shape), []
    for part in (slice(first, first + CHUNK) for first in range(0, shape[1], CHUNK)):
        current = inputs.current[:, part].to(dtype).requires_grad_()
        currents = list(current)
        if "syn_decay" in parameters:
            currents = _filtered(currents, parameters["syn_decay"])
        given_here = given["spikes"][:, part] if given else None
        fired, far = _lif(currents, parameters["beta"], parameters["threshold"], reset, given=given_here)
        torch.autograd.backward(fired, list(inputs.grad_spikes[:, part].to(dtype)))
        assert current.grad is not None
        spikes[:, part], gradient[:, part] = torch.stack(fired) > 0.5, current.grad
        denied.append(far)
    gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    return Run({"current": gradient, **gradients}, {"spikes": spikes}, {"spikes": torch.cat(denied)})


def linear_results(prepared: Prepared, inputs: str, precision: str = "float64") -> Run:
    """Outputs and gradients of the second layer's product alone, for one of the inputs of a :class:`Prepared`."""
    dtype = DTYPES[precision]
    weight, bias = (_parameters(prepared, dtype)[f"fc2.{name}"] for name in ("weight", "bias"))
    outputs, gradients = [], []
    for given, grad_y in zip(*getattr(prepared, inputs), strict=True):  # a time step after the other
        x = given.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = F.linear(x, weight, bias)
        y.backward(grad_y.to(y.dtype))
        assert x.grad is not None
        # kept in float32 to save memory: that rounding is a hundred times below the smallest bound
        outputs.append(y.detach().float())
        gradients.append(x.grad.float())
    assert weight.grad is not None
    assert bias.grad is not None
    results = {"y": torch.stack(outputs), "x": torch.stack(gradients), "weight": weight.grad, "bias": bias.grad}
    return Run(results, {}, {})


@torch.no_grad()
def update_results(
    prepared: Prepared, reset: str = "after decay", precision: str = "float64", given: Results | None = None
) -> Run:
    """Of an update of dynamic sparse training, for each layer: the mean correlation of every unit "fc1.correlation"
    [block rows, block columns], and the scores of the pruned units "fc1.pruned" and of the grown ones "fc1.grown", in
    the order of pruning and growing."""
    parameters, weights = _parameters(prepared, DTYPES[precision]), mean_weights(prepared)
    products = [torch.zeros_like(parameters[f"fc{number}.weight"]) for number in (1, 2, 3)]
    squares = [product.new_zeros(product.shape[1]) for product in products] + [
        products[-1].new_zeros(len(products[-1]))
    ]

    def correlate(images: torch.Tensor, labels: torch.Tensor, layers: list[list[torch.Tensor]]) -> None:
        samples = [torch.cat(layer) for layer in ([images] * prepared.workload.T, *layers)]
        for square, sample in zip(squares, samples, strict=True):
            square += sample.square().sum(0)
        for product, pre, post in zip(products, samples, samples[1:], strict=False):
            product += post.T @ pre

    of_spikes = _in_pieces(correlate, prepared, parameters, reset, precision, given)
    results: Results = {}
    for number, (connection, _) in enumerate(prepared.network("torch").layers()):
        norms = squares[number + 1].sqrt()[:, None] * squares[number].sqrt()[None, :]
        cosine = torch.where(norms > 0, products[number] / norms, 0.0)
        correlation = _unit_means(cosine, connection.mask)
        present = _unit_means(connection.mask.to_dense().double(), connection.mask) > 0
        count = min(int(UPDATE_FRACTION * int(present.sum())), int((~present).sum()))
        name = f"fc{number + 1}"
        results[f"{name}.correlation"] = correlation
        results[f"{name}.pruned"] = weights[number][present].sort().values[:count]
        results[f"{name}.grown"] = correlation[~present].sort(descending=True).values[:count]
    return Run(results, *of_spikes)


def mean_weights(prepared: Prepared) -> list[torch.Tensor]:
    """The mean magnitude of the weights of every unit of each layer, float64 [block rows, block columns]."""
    return [
        _unit_means(connection.dense_weight().detach().double().abs(), connection.mask)
        for connection, _ in prepared.network("torch").layers()
    ]


def _unit_means(matrix: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """The mean of an [out, in] matrix over every unit of the grid of ``mask``."""
    row_of, col_of = (axis.place_of // axis.width for axis in (mask.rows, mask.cols))
    by_row = matrix.new_zeros(mask.grid[0], matrix.shape[1]).index_add_(0, row_of, matrix)
    sums = matrix.new_zeros(mask.grid).index_add_(1, col_of, by_row)
    return sums / (mask.rows.lengths[:, None] * mask.cols.lengths[None, :])
