"""What holds for the tests of networks, beside ``every_test.py``, before which nothing may import PyTorch."""

import functools

import pytest


@pytest.fixture(autouse=True, scope="session")
def _the_small_data_set_is_unpacked_once():
    from g2gnet.data import fashion_mnist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "load_mini", functools.cache(fashion_mnist.load_mini))
        yield


@pytest.fixture
def captions_alone(monkeypatch):
    """Reports without pictures, which take most of the time."""
    from g2gnet.programs.report import content, page

    for name in ("connection_density", "group_inputs", "spike_rasters", "rate_histograms", "confusion", "turnover"):
        monkeypatch.setattr(content.figures, name, lambda *_: None)
    monkeypatch.setattr(content, "picture", lambda figure, caption: page.paragraph(caption))
