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
    """Reports whose pictures are drawn, but not written, which takes most of the time."""
    from g2gnet.programs.report import content, page

    monkeypatch.setattr(content, "picture", lambda figure, caption: page.paragraph(caption))
