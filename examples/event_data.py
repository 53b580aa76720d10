"""Classifies events of a sensor, as in Tonic's data sets, with a G2GNet: which way does the edge move?

The recordings are simulated: an edge sweeps over a sensor of 16 × 16 pixels to the right, left, bottom or top, with
noise. They have the format of Tonic's data sets, structured arrays of (x, y, t, p), and are cut into frames like
``tonic.transforms.ToFrame`` does, so

    data = tonic.datasets.NMNIST("data", transform=tonic.transforms.ToFrame((34, 34, 2), n_time_bins=12))

can replace them. A network takes frames [T, B, polarities, y, x] flattened after B: [T, B, D].

    python examples/event_data.py
"""

import numpy as np
import torch
from torch.utils.data import DataLoader

from g2gnet import G2GNet

EVENT = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.int8)])
SENSOR = (16, 16, 2)  # width, height, polarities
DIRECTIONS = ("right", "left", "down", "up")
TIME_BINS = 12


def record_edge(direction: int, rng: np.random.Generator) -> np.ndarray:
    """A recording of 16 ms, times in µs, of an edge that moves in the given direction: events in order of time."""
    size = SENSOR[0]
    position, across = np.divmod(np.arange(size * size), size)
    events = np.zeros(2 * size * size, EVENT)
    edge, noise = events[: size * size], events[size * size :]
    along = position if direction in (0, 2) else size - 1 - position
    edge["x"], edge["y"] = (along, across) if direction < 2 else (across, along)
    edge["t"] = position * 1000 + rng.integers(0, 1000, size * size)
    edge["p"] = 1
    noise["x"], noise["y"] = rng.integers(0, size, (2, size * size))
    noise["t"], noise["p"] = rng.integers(0, size * 1000, size * size), rng.integers(0, 2, size * size)
    return np.sort(events[rng.random(len(events)) < 0.7], order="t")


def to_frames(events: np.ndarray, time_bins: int = TIME_BINS) -> np.ndarray:
    """Event counts [time_bins, polarity, y, x]: ``tonic.transforms.ToFrame(SENSOR, n_time_bins=time_bins)``."""
    start, end = events["t"][0], events["t"][-1]
    window = (end - start) // time_bins
    if window == 0:
        raise ValueError(f"a recording of {end - start} µs cannot be cut into {time_bins} windows")
    time_bin = (events["t"] - start) // window
    inside = time_bin < time_bins  # the rest of the division is left out
    frames = np.zeros((time_bins, SENSOR[2], SENSOR[1], SENSOR[0]), np.int16)
    np.add.at(frames, (time_bin[inside], events["p"][inside], events["y"][inside], events["x"][inside]), 1)
    return frames


def make_data(count: int, seed: int) -> list[tuple[np.ndarray, int]]:
    """Pairs (frames, direction), in which the directions take turns."""
    rng = np.random.default_rng(seed)
    return [(to_frames(record_edge(i % len(DIRECTIONS), rng)), i % len(DIRECTIONS)) for i in range(count)]


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames as float [T, B, D], time first, and labels [B] (``tonic.collation.PadTensors(batch_first=False)``)."""
    frames, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(frames, 1)).float().flatten(2), torch.tensor(labels)


def main(train_count: int = 512, test_count: int = 128, epochs: int = 4) -> float:
    """Trains and tests; returns the share of the test recordings that are classified correctly."""
    torch.manual_seed(0)
    training = DataLoader(make_data(train_count, seed=0), batch_size=32, shuffle=True, collate_fn=collate)
    net = G2GNet(2 * 16 * 16, 128, len(DIRECTIONS), "mixer", num_groups=4, block_size=16)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        for x, labels in training:  # x [T, B, D]
            loss = torch.nn.functional.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, labels = collate(make_data(test_count, seed=1))
        with torch.no_grad():
            accuracy = (net(x).argmax(1) == labels).float().mean().item()
        print(f"Epoch {epoch:02d} | test_acc={accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
