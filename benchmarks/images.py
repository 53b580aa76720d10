"""Times a training step of networks of images: ``python -m benchmarks.throughput --kernel conv``.

``--network events``: events of two channels, 34 × 34, through 32C3-64C3-P2-128C3-P2-10, pools of spikes, 10 steps,
batch 16, with weights under which the inputs of the convolutions fire in about 10, 7 and 13 % of the steps.
``--network tutorial``: snnTorch's 12C5-P2-64C5-P2-10, without padding and with pools of currents, 25 steps of held
images, batch 64. Forward, cross-entropy of spike counts, backward and fused Adam, whose learning rate is zero; β and θ
are constants. Before anything is timed, spikes, loss, counts and gradients of every contender are compared with float64
as :mod:`benchmarks.correctness` says.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import LIF, G2GConv2d, G2GLinear, SpikingStack
from g2gnet.data import as_samples, load_dataset
from g2gnet.programs.flags import Parser

from . import cli, report
from .contender import ATan
from .correctness import Judge
from .harness import Racer, Session, Turn, race
from .machine import Limits
from .reference import DTYPES, Results, Run, _lif

BETA, THRESHOLD, CLASSES = 0.9, 1.0, 10
Surrogate = tuple[str, float]
ATAN: Surrogate = ("atan", 2.0)
TRIANGLE: Surrogate = ("triangle", 4.0)
#: samples of a piece of the reference
PIECE = 4


class Block(NamedTuple):
    """A layer: a convolution of so many channels and rows of a kernel, or (``kernel`` 0) the linear output; whether
    spikes are pooled before it, or its currents behind it."""

    size: int
    kernel: int = 0
    padding: int = 0
    before: bool = False
    after: bool = False


class Network(NamedTuple):
    """What is timed; ``gain`` is a factor on PyTorch's initial weights of convolutions."""

    shape: tuple[int, int, int]
    blocks: tuple[Block, ...]
    steps: int
    samples: int
    held: bool
    gain: float


NETWORKS = {
    "events": Network(
        (2, 34, 34), (Block(32, 3, 1), Block(64, 3, 1), Block(128, 3, 1, before=True), Block(CLASSES, before=True)),
        10, 16, held=False, gain=2.25,
    ),
    "tutorial": Network(
        (1, 28, 28), (Block(12, 5, after=True), Block(64, 5, after=True), Block(CLASSES)), 25, 64, held=True, gain=2.0
    ),
}  # fmt: skip


class Prepared(NamedTuple):
    """A network with its inputs, [T, B, C, H, W] or held [B, C, H, W], labels, and a module for each block."""

    network: Network
    images: torch.Tensor
    labels: torch.Tensor
    modules: list[Any]


def prepare(network: Network) -> Prepared:
    """The same for all contenders."""
    torch.manual_seed(0)
    channels, rows, columns = network.shape
    modules: list[Any] = []
    for block in network.blocks:
        rows, columns = (side // 2 if block.before else side for side in (rows, columns))
        if block.kernel:
            module = nn.Conv2d(channels, block.size, block.kernel, padding=block.padding)
            module.weight.data.mul_(network.gain)
            rows, columns = (side + 2 * block.padding - block.kernel + 1 for side in (rows, columns))
            modules.append(module)
        else:
            modules.append(nn.Linear(channels * rows * columns, block.size))
        channels = block.size
        rows, columns = (side // 2 if block.after else side for side in (rows, columns))
    if network.held:
        images = as_samples(load_dataset("fashionmnist-mini").train_images[: network.samples]).view(-1, *network.shape)
    else:
        images = (torch.rand(network.steps, network.samples, *network.shape) < 0.1).float()
    return Prepared(network, images, torch.arange(network.samples) % CLASSES, modules)


def current_of(block: Block, module: Callable, y: torch.Tensor) -> torch.Tensor:
    """What a layer gives of images [N, C, H, W]."""
    y = F.max_pool2d(y, 2) if block.before else y
    y = module(y) if block.kernel else module(y.flatten(1))
    return F.max_pool2d(y, 2) if block.after else y


Neurons = Callable[[torch.Tensor], torch.Tensor]


def at_once(
    network: Network, x: torch.Tensor, modules: Sequence[Any], neurons: Neurons
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Spike counts and the spikes of each layer, all steps of a layer at once; ``neurons`` take currents [T, B, …]."""
    trains: list[torch.Tensor] = []
    for block, module in zip(network.blocks, modules, strict=True):
        if not trains and network.held:
            current = current_of(block, module, x)
            current = current.expand(network.steps, *current.shape)
        else:
            source = trains[-1] if trains else x
            current = current_of(block, module, source.flatten(0, 1)).unflatten(0, source.shape[:2])
        trains.append(neurons(current))
    return trains[-1].sum(0), trains


def _forward(current: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    membrane, spikes, membranes = torch.zeros_like(current[0], dtype=torch.float32), [], []
    for now in current:
        membrane = BETA * membrane + now - THRESHOLD * (membrane > THRESHOLD)
        membranes.append(membrane - THRESHOLD)
        spikes.append((membrane > THRESHOLD).to(current.dtype))
    return torch.stack(spikes), torch.stack(membranes)


def _backward(grad: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    slope, carried, grads = grad / (1 + (torch.pi * above) ** 2), torch.zeros_like(above[0]), []
    for t in range(len(grad) - 1, -1, -1):
        carried = BETA * carried + slope[t]
        grads.append(carried.to(grad.dtype))
    return torch.stack(grads[::-1])


class CompiledLIF(torch.autograd.Function):
    """LIF neurons with ATan whose two loops over time are compiled."""

    loops: Any = None

    @staticmethod
    def forward(ctx: Any, current: torch.Tensor) -> torch.Tensor:
        CompiledLIF.loops = CompiledLIF.loops or (torch.compile(_forward), torch.compile(_backward))
        spikes, above = CompiledLIF.loops[0](current)
        ctx.save_for_backward(above)
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return CompiledLIF.loops[1](grads[0], *ctx.saved_tensors)


def plain_lif(current: torch.Tensor) -> torch.Tensor:
    """LIF neurons with ATan, one operation after another."""
    membrane, spikes = torch.zeros_like(current[0]), []
    for now in current:
        membrane = BETA * membrane + now - THRESHOLD * (membrane.detach() > THRESHOLD)
        spikes.append(ATan.apply(membrane - THRESHOLD))
    return torch.stack(spikes)


#: spike counts [B, C] and the spikes of each layer [T, B, …] of a contender, or what gives them by ``dense()``
Counted = Callable[[], tuple[torch.Tensor, Sequence[Any]]]


def g2g(given: Prepared, surrogate: Surrogate) -> tuple[Counted, list[Any]]:
    """A :class:`g2gnet.SpikingStack`."""
    name, alpha = surrogate
    layers: list[Any] = []
    modules = [
        G2GConv2d.from_conv2d(each) if isinstance(each, nn.Conv2d) else G2GLinear.from_linear(each)
        for each in given.modules
    ]
    for block, module in zip(given.network.blocks, modules, strict=True):
        layers += [nn.MaxPool2d(2)] if block.before else []
        layers += [] if block.kernel else [nn.Flatten()]
        connection = nn.Sequential(module, nn.MaxPool2d(2)) if block.after else module
        layers.append((connection, LIF(beta=BETA, threshold=THRESHOLD, surrogate=name, alpha=alpha)))
    net = SpikingStack(layers, given.network.steps)
    for neurons in net.neurons().values():
        neurons.requires_grad_(False)

    def counted() -> tuple[torch.Tensor, Sequence[Any]]:
        activity = net.simulate(given.images)
        return activity.counts, activity.spikes  # as bits; they are made dense for the check alone

    return counted, modules


def multi_step(given: Prepared, surrogate: Surrogate) -> tuple[Counted, list[Any]]:
    """oneDNN's convolutions in channels-last memory, all steps at once, and compiled neurons."""
    x, modules = given.images, [each.to(memory_format=torch.channels_last) for each in given.modules]
    x = x.flatten(0, -4).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:-3])
    return lambda: at_once(given.network, x, modules, CompiledLIF.apply), modules


def compiled(given: Prepared, surrogate: Surrogate) -> tuple[Counted, list[Any]]:
    """The whole network through ``torch.compile``."""
    run = torch.compile(lambda x: at_once(given.network, x, given.modules, plain_lif), fullgraph=True)
    return lambda: run(given.images), given.modules


def spikingjelly(given: Prepared, surrogate: Surrogate) -> tuple[Counted, list[Any]]:
    """SpikingJelly's multi-step neurons behind layers over all steps."""
    from .peers.spikingjelly_multistep import _MultiStepLIF

    neurons = _MultiStepLIF(torch.tensor(BETA), torch.tensor(THRESHOLD))
    return lambda: at_once(given.network, given.images, given.modules, neurons), given.modules


def snntorch(given: Prepared, surrogate: Surrogate) -> tuple[Counted, list[Any]]:
    """A Python loop over time steps, as in snnTorch's tutorials."""
    import snntorch  # which not everyone has

    options = {"beta": BETA, "threshold": THRESHOLD, "spike_grad": snntorch.surrogate.atan(alpha=2.0)}
    cells = [snntorch.Leaky(**options) for _ in given.modules]

    def counted() -> tuple[torch.Tensor, list[torch.Tensor]]:
        states: list[Any] = [cell.init_leaky() for cell in cells]
        trains: list[list[torch.Tensor]] = [[] for _ in cells]
        for now in [given.images] * given.network.steps if given.network.held else given.images:
            spikes = now
            for number, (block, module) in enumerate(zip(given.network.blocks, given.modules, strict=True)):
                spikes, states[number] = cells[number](current_of(block, module, spikes), states[number])
                trains[number].append(spikes)
        return torch.stack(trains[-1]).sum(0), [torch.stack(each) for each in trains[:-1]] + [torch.stack(trains[-1])]

    return counted, given.modules


class Form(NamedTuple):
    """A contender."""

    make: Callable[[Prepared, Surrogate], tuple[Counted, list[Any]]]
    surrogate: Surrogate = ATAN
    precision: str = "fp32"
    reset: str = "after decay"
    differs: str = ""
    slow: bool = False  # compiles for a minute or so


FORMS = {
    "g2g-cpu-triangle": Form(g2g, TRIANGLE, differs="surrogate triangle, alpha 4, all others ATan"),
    "g2g-cpu": Form(g2g),
    "onednn": Form(multi_step),
    "onednn-bf16": Form(multi_step, precision="bf16"),
    "compiled": Form(compiled, slow=True),
    "spikingjelly": Form(spikingjelly, reset="before decay", differs="resets before the decay, checked against that"),
    "snntorch": Form(snntorch),
}


def session(network: Network, label: str) -> Session:
    """A training step of a contender."""
    form, given = FORMS[label], prepare(network)
    yield None
    counted, modules = form.make(given, form.surrogate)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)

    def learn() -> tuple[torch.Tensor, torch.Tensor, Sequence[Any]]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=form.precision == "bf16"):
            counts, trains = counted()
        loss = F.cross_entropy(counts.float(), given.labels)
        loss.backward()
        return loss.detach(), counts.detach(), trains

    def step() -> None:
        learn()
        optimizer.step()

    def results() -> Any:
        loss, counts, trains = learn()
        found: Results = {"loss": loss, "counts": counts.float()}
        for number, module in enumerate(modules, 1):
            weight = module.mask.unpack(module.values.grad) if hasattr(module, "values") else module.weight.grad
            found |= {f"{number}.weight": weight, f"{number}.bias": module.bias.grad}
        for number, train in enumerate(trains, 1):
            dense = train.detach() if isinstance(train, torch.Tensor) else train.dense().detach()
            found[f"{number}.spikes"] = dense.flatten(2) > 0.5
        return {name: each.numpy() for name, each in found.items()}

    yield Turn(step, results)


class ImageJudge(Judge):
    """The judge of networks of images under one surrogate."""

    def __init__(self, given: Prepared, surrogate: Surrogate) -> None:
        self._given, self._surrogate = given, surrogate
        self._prepared: Any = given  # of which it reads the labels
        self._kernel, self._masks = "conv", {}
        self._rounding = functools.cache(self._compute_rounding)
        self._replays = {}

    def _run(self, reset: str, precision: str = "float64", given: Results | None = None) -> Run:
        network, images, labels, modules = self._given
        parameters = [
            [each.detach().to(DTYPES[precision]).requires_grad_() for each in (module.weight, module.bias)]
            for module in modules
        ]
        loss, counts = torch.zeros((), dtype=DTYPES[precision]), []
        trains: list[list[torch.Tensor]] = [[] for _ in modules]
        denied: list[list[torch.Tensor]] = [[] for _ in modules]

        def product(block: Block, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                y = F.conv2d(y, weight, bias, padding=block.padding) if block.kernel else F.linear(y, weight, bias)
            return y.to(DTYPES[precision])

        for piece in torch.arange(len(labels)).split(PIECE):
            number = iter(range(len(modules)))

            def neurons(current: torch.Tensor, piece: Any = piece, number: Any = number) -> torch.Tensor:
                here = next(number)
                own = None if given is None else given[f"{here + 1}.spikes"][:, piece]
                flat, constant = current.flatten(2), functools.partial(torch.full, (1,), dtype=current.dtype)
                spikes, wrong = _lif(
                    [*flat],
                    constant(fill_value=BETA),
                    constant(fill_value=THRESHOLD),
                    reset,
                    *self._surrogate,
                    None,
                    own,
                )
                denied[here].append(wrong)
                return torch.stack(spikes).view_as(current)

            layers = [
                functools.partial(product, *each)
                for each in zip(network.blocks, *zip(*parameters, strict=True), strict=True)
            ]
            x = images[piece] if network.held else images[:, piece]
            of_piece, spikes = at_once(network, x.to(DTYPES[precision]), layers, neurons)
            share = F.cross_entropy(of_piece, labels[piece], reduction="sum") / len(labels)
            share.backward()
            loss = loss + share.detach()
            counts.append(of_piece.detach())
            for train, one in zip(trains, spikes, strict=True):
                train.append(one.detach().flatten(2) > 0.5)
        results: Results = {"loss": loss, "counts": torch.cat(counts)}
        for place, (weight, bias) in enumerate(parameters, 1):
            assert weight.grad is not None
            assert bias.grad is not None
            results |= {f"{place}.weight": weight.grad, f"{place}.bias": bias.grad}
        names = [f"{place}.spikes" for place in range(1, len(modules) + 1)]
        joined = {name: torch.cat(each, 1) for name, each in zip(names, trains, strict=True)}
        return Run(results, joined, {name: torch.cat(each) for name, each in zip(names, denied, strict=True)})


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Checks and times every contender."""
    network = NETWORKS[arguments.network]
    changes = {"steps": arguments.T, "samples": arguments.batch_size}
    network = network._replace(**{name: value for name, value in changes.items() if value is not None})
    given, limits = prepare(network), Limits(torch.device("cpu"))
    judge = functools.cache(lambda surrogate: ImageJudge(given, surrogate))
    wanted = arguments.contenders.split(",") if arguments.contenders else [*FORMS]
    if unknown := set(wanted) - FORMS.keys():
        raise ValueError(f"contenders={', '.join(sorted(unknown))} are unknown; choose from {', '.join(FORMS)}")
    racers = []
    for label in wanted:
        form = FORMS[label]

        def check(run: dict[str, Any], answer: Any, form: Form = form) -> str:
            results = {name: torch.as_tensor(each) for name, each in answer.items()}
            verdict = judge(form.surrogate).verdict(results, form.reset, form.precision, True, ())
            rates = [float(each.float().mean()) for name, each in results.items() if name.endswith("spikes")]
            run.update(firing_rates=rates, closest=verdict.closest())
            return verdict.objection

        run = {"contender": label, "precision": form.precision, "differs": form.differs, "place": 0}
        skipped = arguments.quick and form.slow and not arguments.contenders
        status, reason = ("skipped", "it compiles for minutes; name it in --contenders") if skipped else ("timed", "")
        racers.append(Racer(label, session, (network, label), run, check, status, reason))
    race(racers, arguments.repeats, between_rounds=limits.measure)
    rates = limits.rates()
    about = {"x": None, "network": arguments.network, "T": network.steps, "batch_size": network.samples}
    return {
        "kernel": "conv", "quantity": None, "baseline": "snntorch", "limits": rates, "workloads": [about],
        "runs": [racer.summary() for racer in racers],
    }  # fmt: skip


COLUMNS = ("median", "20–80 %", "processor time", "times as fast", "peak memory", "first turn", "rates, %", "error")


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--network", choices=tuple(NETWORKS), default="events", help="what is trained (default: events)"
    )
    parser.add_argument("--T", type=int, metavar="N", help="time steps (default: the network's)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="samples (default: the network's)")
    parser.add_argument("--contenders", metavar="A,B,...", help=f"only these of {', '.join(FORMS)}")


PROGRAM = cli.Program(
    "throughput --kernel conv", __doc__, "about five minutes on two cores", measure,
    functools.partial(report.text, columns=COLUMNS), {"repeats": (10, "timed turns")},
    {"repeats": 3, "T": 4, "batch_size": 4}, add_flags,
)  # fmt: skip
