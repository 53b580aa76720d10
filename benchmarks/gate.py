"""Fails where a training step is no longer several times as fast as the usual one: ``python -m benchmarks.gate``.

Each row of :data:`GATES` races the CPU kernels against a peer in this process, in turn, after the results of both were
checked. It takes 15 s on an idle machine. The bound 6 is half of the smaller speed-up in the records of two machines,
rounded down: against the masked snnTorch loop the default step is 16.3 times as fast in
``results/step-2-core-zen4.jsonl`` and 13.3 times in ``results/step-2-core-emeraldrapids.jsonl``. The gate's network is
smaller, and both run on one thread, so that other programs change little. It is no test: tests measure no time.
"""

import sys
import time
from functools import partial
from typing import NamedTuple

import torch

from .contender import NetworkContender
from .correctness import Judge
from .harness import in_turn
from .machine import pytorch_threads, timed
from .ours import Network
from .peers.snntorch_loop import MaskedLoop
from .workload import Workload, load, prepare

ROUNDS = 5


class Gate(NamedTuple):
    """A workload, the peer that it is raced against, and how many times as fast g2g is at least."""

    name: str
    workload: Workload
    peer: type[MaskedLoop]
    least: float


GATES = (Gate("masked loop", Workload(batch_size=32, T=10, hidden_dim=1024, train_steps=5), MaskedLoop, 6.0),)


def main() -> int:
    began, cpu, status = time.perf_counter(), torch.device("cpu"), 0
    for gate in GATES:
        prepared = load(prepare(gate.workload))
        judge = Judge(prepared, "step")
        ours, theirs = Network(prepared, cpu, "fp32", backend="cpu"), gate.peer(prepared, cpu, "fp32")
        racers: dict[str, NetworkContender] = {"g2g": ours, "peer": theirs}
        wrong = [f"{name} is wrong: {of}" for name, racer in racers.items() if (of := objection(judge, racer))]
        with pytorch_threads(1):  # other programs slow down threads that wait for one another most of all
            taken = in_turn({name: partial(timed, racer.step, cpu) for name, racer in racers.items()}, ROUNDS)
        least, other = (min(taken[name]) for name in racers)  # the least, since other programs share the machine
        failed, factor = bool(wrong) or other / least < gate.least, other / least
        status |= failed
        took = f"{least * 1e3:.0f} and {other * 1e3:.0f} ms, {time.perf_counter() - began:.0f} s"
        verdict = f"{'FAILED' if failed else 'passed'}: {factor:.1f} times as fast as the {gate.name}"
        print(f"{verdict} (at least {gate.least:g}; {took})", *wrong, sep="; ")
    return status


def objection(judge: Judge, racer: NetworkContender) -> str:
    """What is wrong about the results of a step, or ""."""
    return judge.verdict(racer.results("step"), racer.reset, racer.precision, racer.masked, racer.omits).objection


if __name__ == "__main__":
    sys.exit(main())
