"""The least time that the workload's arithmetic and memory traffic can take at the machine's own rates.

Floating-point operations count active weights only: 2·T·B per weight for each of forward, input gradient and weight
gradient. ``fc1`` gets the same input at every step and needs no input gradient: 2·B per weight, forward and once more.
The input gradients of ``fc2`` and of recurrent connections count the neurons that pass a gradient on, which are few
under a surrogate with compact support. A recurrent connection has no input at the first step.
Bytes count the passes over [T, B, N] float32 that LIF neurons need at least: two forward (currents in, spikes
out), three backward (the spikes' gradient and the membranes in, the currents' gradient out). A kernel that skips
silent neurons or packs spikes can be faster than this floor.

A product alone reads x and writes y, then reads x and the gradient of y and writes that of x, all [T, B, H] float32.
An update must read every spike once; its products, of sums over units, are not counted.
"""

from .workload import Prepared


def work(prepared: Prepared, kernel: str) -> dict[str, int]:
    """``flop`` and ``bytes`` of one turn."""
    w = prepared.workload
    samples = w.T * w.batch_size
    if kernel in ("lif", "synaptic"):
        return {"flop": 0, "bytes": 5 * 4 * samples * w.hidden_dim}
    weights = prepared.active_weights()
    if kernel.startswith("linear"):
        return {"flop": 3 * 2 * samples * weights["fc2"], "bytes": 5 * 4 * samples * w.hidden_dim}
    neurons = 2 * w.hidden_dim + prepared.num_classes
    if kernel == "dst":
        return {"flop": 0, "bytes": 4 * (samples * neurons + prepared.images.numel())}
    passes = {name: samples - w.batch_size if name.startswith("rec") else samples for name in weights}
    passes["fc1"] = w.batch_size
    products = sum(passes[name] * count for name, count in weights.items())
    if kernel == "forward":
        return {"flop": 2 * products, "bytes": 2 * 4 * samples * neurons}
    shares = dict(zip(("1", "2", "3"), prepared.event_shares, strict=True))
    input_gradients = sum(passes[name] * count * shares[name[-1]] for name, count in weights.items() if name != "fc1")
    return {"flop": 2 * (2 * products + round(input_gradients)), "bytes": 5 * 4 * samples * neurons}


def floor_seconds(done: dict[str, int], rates: dict[str, float]) -> float:
    """The time of that work, products and traffic one after the other, at :meth:`benchmarks.machine.Limits.rates`."""
    return done["flop"] / rates["matrix_flop_per_s"] + done["bytes"] / rates["copy_bytes_per_s"]
