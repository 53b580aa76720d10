"""The example programs do what they say."""

import numpy as np
import pytest

from examples import event_data


def test_events_become_counts_in_equal_windows():
    events = event_data.record_edge(2, np.random.default_rng(0))
    frames, expected = event_data.to_frames(events, time_bins=5), np.zeros((5, 2, 16, 16), int)
    window = (events["t"][-1] - events["t"][0]) // 5
    for x, y, t, p in events.tolist():
        time_bin = (t - events["t"][0]) // window
        if time_bin < 5:
            expected[time_bin, p, y, x] += 1
    assert np.array_equal(frames, expected)
    assert frames.sum() > 0.9 * len(events)
    with pytest.raises(ValueError, match="cannot be cut into 100000 windows"):
        event_data.to_frames(events, time_bins=100_000)


def test_the_direction_of_an_edge_is_learned_from_events():
    x, labels = event_data.collate(event_data.make_data(6, seed=3))
    assert x.shape == (event_data.TIME_BINS, 6, 512)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert event_data.main(train_count=256, test_count=64, epochs=4) > 0.75  # 0.25 by chance
