"""The example programs do what they say."""

import numpy as np
import pytest

from examples import cortex_m, event_data, fit_gains


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


@pytest.mark.long
@pytest.mark.skipif(bool(cortex_m.missing()), reason=f"there is no {', '.join(cortex_m.missing())}")
def test_a_cortex_m7_has_the_outputs_of_pytorch(tmp_path, capsys):
    assert cortex_m.main(["--epochs", "1", "--images", "3", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("the outputs for 3 images are those of PyTorch, here and as a Cortex-M7") == 2


def test_compilers_that_are_missing_are_named_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cortex_m.main(["--folder", str(tmp_path / "none")]) == 1
    assert "cc, arm-none-eabi-gcc, qemu-system-arm cannot be found; on Debian:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.ci
def test_gains_of_pairs_of_types_learn_the_rates_of_known_ones(monkeypatch):
    """A small network, which the program's own takes minutes for."""
    for name, value in (("SIZE", 60), ("NEURONS", 600), ("FAN_OUT", 30), ("STEPS", 40)):
        monkeypatch.setattr(fit_gains, name, value)
    before, after = fit_gains.fit(0, 25)
    assert before > 0.3
    assert after < 0.6 * before
