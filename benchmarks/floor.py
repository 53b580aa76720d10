"""The least time that the workload's arithmetic and memory traffic can take at the machine's own rates.

Floating-point operations count active weights only: 2·T·B per weight for each of forward, input gradient and weight
gradient. ``fc1`` gets the same input at every step and needs no input gradient: 2·B per weight, forward and once more.
The input gradient of ``fc2`` counts the neurons of layer 2 that pass a gradient on, which are few under a surrogate
with compact support.
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
    first, second, third = prepared.active_weights()
    if kernel.startswith("linear"):
        return {"flop": 3 * 2 * samples * second, "bytes": 5 * 4 * samples * w.hidden_dim}
    neurons = 2 * w.hidden_dim + prepared.num_classes
    if kernel == "dst":
        return {"flop": 0, "bytes": 4 * (samples * neurons + prepared.images.numel())}
    held, varying = w.batch_size * first, samples * (second + third)
    if kernel == "forward":
        return {"flop": 2 * (held + varying), "bytes": 2 * 4 * samples * neurons}
    input_gradient = round(samples * (prepared.event_share * second + third))
    return {"flop": 2 * (2 * held + 2 * varying + input_gradient), "bytes": 5 * 4 * samples * neurons}


def floor_seconds(done: dict[str, int], rates: dict[str, float]) -> float:
    """The time of that work, products and traffic one after the other, at :meth:`benchmarks.machine.Limits.rates`."""
    return done["flop"] / rates["matrix_flop_per_s"] + done["bytes"] / rates["copy_bytes_per_s"]
