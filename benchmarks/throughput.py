"""Times g2g against the libraries that people use: ``python -m benchmarks.throughput``.

A training step (forward, cross-entropy, backward, fused Adam), its forward pass, or one of its parts alone; same sizes,
same weights, same images for all; results are compared with a float64 reference before anything is timed.

With ``--quantity`` one network is trained for each value of a quantity, all contenders take turns, and a straight line
is fitted to the medians by least squares: seconds against multiplications and additions of the active weights. If the
line fits and begins near zero, the cost of a sparse network is proportional to its active weights.
"""

import argparse
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from g2g_kernels import available_backends
from g2gnet.programs.flags import Parser

from . import cli, images, records, report
from .contender import Contender
from .correctness import Judge
from .floor import floor_seconds, work
from .harness import Racer, Session, Turn, nothing, race
from .machine import Limits
from .registry import KERNELS, Entry, choose
from .workload import Prepared, Workload, load


class Quantity(NamedTuple):
    """What can grow."""

    field: str  # of the workload
    values: tuple[Any, ...]  # unless others are given
    x_is: str  # the label of x
    x: Callable[[Prepared], float] | None = None  # of a prepared workload; None: the value itself
    changes_at: Callable[[Any], dict[str, Any]] = lambda value: {}  # of the workload, by the value
    beside_dense: bool = False  # with the memory of a dense network's parameters: computed, as the largest cannot run


WIDE_GROUP = 256  # neurons in a group of a wide layer


def _wide(neurons: int) -> dict[str, Any]:
    """Groups of one size, with as many weights between them as inside, so that a neuron has as many in any layer."""
    groups = neurons // WIDE_GROUP
    return {"num_groups": groups, "p_inter": 1 / max(1, groups - 1)}


QUANTITIES = {
    "p_inter": Quantity("p_inter", (0.0, 0.05, 0.15, 0.3, 0.6, 1.0), "density of all weights", Prepared.density),
    "block_size": Quantity("block_size", (1, 4, 16, 32, 64), "side of a connection unit, weights"),
    "groups": Quantity("num_groups", (1, 2, 4, 8, 10), "groups on each side of a layer"),
    "T": Quantity("T", (10, 20, 30, 40, 50), "time steps T"),
    "B": Quantity("batch_size", (1, 8, 32, 128, 256), "batch size B"),
    "H": Quantity("hidden_dim", (128, 256, 512, 1024, 2048), "hidden neurons H"),
    "wide": Quantity(
        "hidden_dim", (1024, 4096, 16384, 65536), f"hidden neurons H in groups of {WIDE_GROUP}", None, _wide, True
    ),
}


def add_flags(parser: Parser) -> None:
    if Path(sys.argv[0]).stem == "g2g-bench":
        parser.prog = "g2g-bench"
    parser.add_argument("--kernel", default="step", choices=(*KERNELS, "conv"), help="what to time (default: step)")
    parser.add_argument("--quantity", choices=tuple(QUANTITIES), help="what grows (default: nothing)")
    parser.add_argument("--values", metavar="X,Y,...", help="its values, where they are not those below")
    text = "an earlier record of the same command, to compare each contender's time with"
    parser.add_argument("--before", type=Path, metavar="FILE", help=text)
    cli.add_flags(parser)


def workloads_of(arguments: argparse.Namespace) -> list[Workload]:
    """The workload of each value of the quantity that grows, or one; raises ValueError for values without a quantity,
    or too few of them."""
    kernel = KERNELS[arguments.kernel]
    base = cli.workload_from(arguments, kernel.usual, **kernel.workload)
    if arguments.quantity is None:
        if arguments.values:
            raise ValueError("values need a quantity; give `quantity`, too")
        return [base]
    quantity = QUANTITIES[arguments.quantity]
    values = quantity.values[:3] if arguments.quick else quantity.values
    if arguments.values:
        values = tuple(map(type(values[0]), arguments.values.split(",")))
    if len(set(values)) < 2:
        raise ValueError(f"values={arguments.values!r}: a line needs at least two different values")
    return [dataclasses.replace(base, **{quantity.field: each}, **quantity.changes_at(each)) for each in values]


def contender(entry: Entry, path: Path, kernel: str, device: str) -> Session:
    """A contender on a prepared workload."""
    module, _, name = entry.target.partition(":")
    kind: type[Contender] = getattr(importlib.import_module(module), name)
    prepared = load(path)
    kind.preload(prepared, entry.precision, entry.options.get("inputs", ""))
    yield torch.device(device)
    one = kind(prepared, torch.device(device), entry.precision, **entry.options)

    def results() -> dict[str, Any]:
        results = {name: tensor.detach().cpu() for name, tensor in one.results(kernel).items()}
        wider = {name: each.float() if each.dtype == torch.bfloat16 else each for name, each in results.items()}
        # numpy, which has no bfloat16, goes through the pipe as it is; tensors would go through shared memory that dies
        return {
            "results": {name: each.numpy() for name, each in wider.items()},
            "firing_rates": one.firing_rates(results),
            "differs": one.differs,
            "how": (one.reset, entry.precision, one.masked, one.omits),
        }

    yield Turn(getattr(one, KERNELS[kernel].method), results, one.before_turn)


def measure(
    kernel: str,
    jobs: Sequence[tuple[Entry, Path]],
    repeats: int,
    warm_up: int = 2,
    between_rounds: Callable[[], None] = nothing,
    device: str = "cpu",
) -> Sequence[Racer]:
    """Checks and times contenders, each on a prepared workload; one that is unavailable comes back as skipped."""
    judge = functools.cache(lambda path: Judge(load(path), kernel))

    def racer(entry: Entry, path: Path) -> Racer:
        run: dict[str, Any] = {"contender": entry.label, "precision": entry.precision, "differs": ""}
        run |= {"firing_rates": None, "closest": None}

        def check(run: dict[str, Any], answer: dict[str, Any]) -> str:
            results = {name: torch.as_tensor(array) for name, array in answer["results"].items()}
            verdict = judge(path).verdict(results, *answer["how"])
            run.update(firing_rates=answer["firing_rates"], differs=answer["differs"], closest=verdict.closest())
            return verdict.objection

        status, reason = "skipped" if entry.unavailable else "timed", entry.unavailable or ""
        return Racer(entry.label, contender, (entry, path, kernel, device), run, check, status, reason)

    def rest() -> None:
        judge.cache_clear()
        between_rounds()

    return race([racer(*job) for job in jobs], repeats, warm_up, rest)


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    device, kernel = cli.device_from(arguments), KERNELS[arguments.kernel]
    quantity = QUANTITIES[arguments.quantity] if arguments.quantity else None
    entries, workloads = contenders(arguments, quantity), workloads_of(arguments)
    before = earlier(arguments.before, arguments.kernel, workloads) if arguments.before else None
    own = [(entry, number, entry.own(workload)) for entry in entries for number, workload in enumerate(workloads)]
    needed = [*workloads, *(workload for entry, _, workload in own if entry.unavailable is None)]
    prepared = {each: cli.prepare_with_bar(each, arguments.data_dir) for each in dict.fromkeys(needed)}
    first = prepared[workloads[0]][1]
    w, about = first.workload, report.network({**first.workload.as_dict(), "density": first.density()})
    learnt = f"{w.dataset}, after {w.train_steps} training steps (test accuracy {first.test_accuracy:.2f})"
    print(f"{kernel.about}: {about}; {learnt}", flush=True)

    limits = Limits(device)
    jobs = [(entry, prepared.get(workload, prepared[workloads[0]])[0]) for entry, _, workload in own]
    outcomes = measure(arguments.kernel, jobs, arguments.repeats, 2, limits.measure, str(device))
    rates = limits.rates()

    def place(workload: Workload) -> dict[str, Any]:
        one = prepared[workload][1]
        x = quantity and (quantity.x(one) if quantity.x else getattr(workload, quantity.field))
        done = work(one, arguments.kernel)
        place = {"x": x, **one.workload.as_dict(), "density": one.density(), "note": one.note, **done}
        place |= {"test_accuracy": one.test_accuracy, "floor_seconds": floor_seconds(done, rates)}
        return place | ({"dense_bytes": dense_bytes(one)} if quantity and quantity.beside_dense else {})

    places = {workload: place(workload) for workload in prepared}
    runs = []
    for (_, number, workload), outcome in zip(own, outcomes, strict=True):
        run = {"place": number, **outcome.summary()}
        if outcome.status == "timed" and workload != workloads[number]:
            run["floor_seconds"] = places[workload]["floor_seconds"]
        runs.append(run)
    if before:
        print(report.compared(runs, before))
    about_it = {"kernel": arguments.kernel, "quantity": arguments.quantity, "x_is": quantity and quantity.x_is}
    of_places = [places[workload] for workload in workloads]
    return {**about_it, "baseline": kernel.baseline, "limits": rates, "workloads": of_places, "runs": runs}


def earlier(path: Path, kernel: str, workloads: Sequence[Workload]) -> dict[str, Any]:
    """An earlier record of the same work; raises ValueError if it is of other work."""
    before, wanted = records.read(path), [kernel, *(workload.as_dict() for workload in workloads)]
    found = [before["kernel"], *({name: place.get(name) for name in wanted[-1]} for place in before["workloads"])]
    if found != wanted:
        raise ValueError(f"before: {path} is of {found}, not of {wanted}")
    return before


def dense_bytes(prepared: Prepared) -> int:
    """Memory of the dense network's weights, their gradients and Adam's two moments, in float32."""
    hidden = prepared.workload.hidden_dim
    return 4 * 4 * hidden * (prepared.images.shape[1] + hidden + prepared.num_classes)


def contenders(arguments: argparse.Namespace, quantity: Quantity | None) -> list[Entry]:
    """The contenders requested by the flags; by default all, or of a quantity g2g at its best and a peer or two."""
    asked = arguments.contenders, arguments.backend, arguments.precision
    if quantity is not None and not any(asked):
        beside = [] if quantity.beside_dense else ["snntorch-masked", "dense-lif"]
        return choose(arguments.kernel, ",".join([f"g2g-{available_backends()[0]}", *beside]))
    entries = choose(arguments.kernel, *asked)
    if arguments.quick and not arguments.contenders:
        reason = "--quick skips what compiles for a minute; name it in --contenders to include it"
        skipped = {entry.label: entry.unavailable or (reason if entry.compiles else None) for entry in entries}
        entries = [dataclasses.replace(entry, unavailable=skipped[entry.label]) for entry in entries]
    return entries


def table(record: dict[str, Any]) -> str:
    """The tables of a record, and the machine's own rates."""
    rates, floor = record["limits"], record["workloads"][0]["floor_seconds"]
    return (
        f"{report.text(record)}\nThis machine multiplies at {rates['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s and copies "
        f"at {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s: the floor of this is {report.seconds(floor)}."
    )


PROGRAM = cli.Program(
    "throughput", __doc__, "about twelve minutes on two cores, most of them in peers; --kernel recurrent about two",
    throughput, table, {"repeats": (10, "timed turns")}, cli.QUICK, add_flags,
    epilog="\n".join([
        "kernels:", *(f"  {name:13} {kernel.about}" for name, kernel in KERNELS.items()),
        "  conv          training step of networks of images; --kernel conv --help lists its own flags",
        "quantities:", *(f"  {name:13} {', '.join(map(str, each.values))}" for name, each in QUANTITIES.items()),
        "With a quantity g2g on its best backend takes part, the masked snnTorch loop and the dense layers with",
        "our LIF; for wide layers g2g alone.",
    ]),
)  # fmt: skip
build_parser = PROGRAM.build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, of networks of images that of :mod:`benchmarks.images`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--kernel")
    chosen, others = first.parse_known_args(argv)
    return images.PROGRAM.main(others) if chosen.kernel == "conv" else PROGRAM.main(argv)


if __name__ == "__main__":
    sys.exit(main())
