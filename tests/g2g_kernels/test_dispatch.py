"""Which backend serves a call: forced, preferred, refused, and told once."""

import logging

import pytest
import torch
from helpers import unavailable

from g2g_kernels import BackendError, available_backends, backend_status, dispatch, lif
from g2g_kernels.dispatch import BACKENDS, Backend, Operator, forced_backend, register_backend, require_backend


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("G2G_BACKEND", raising=False)


@pytest.fixture
def available(monkeypatch):
    """Makes all three backends available, whatever this machine has, and Triton's kernels no interpreted ones."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    unavailable(monkeypatch, **dict.fromkeys(BACKENDS))


@pytest.fixture
def double() -> Operator:
    """An operator that all three backends serve; its result tells which one did."""
    operator = Operator("double")
    for name in BACKENDS:
        operator.register(name, lambda x, scale=1, name=name: (name, 2 * x * scale))
    return operator


def test_backends_are_preferred_in_the_order_triton_cpu_torch(monkeypatch, available, double):
    assert double(3) == ("triton", 6)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # an interpreter serves only calls that ask for it by name
    assert double(3) == ("cpu", 6)
    assert double(3, backend="triton") == ("triton", 6)
    unavailable(monkeypatch, cpu="no compiler")
    assert double(3) == ("torch", 6)


def test_a_backend_that_refuses_a_call_is_passed_over_and_no_error_of_one_is_hidden(available):
    operator = Operator("half")
    operator.register("triton", lambda x: ("triton", 4 / (x - 2)), lambda x: "odd number" if x % 2 else None)
    operator.register("torch", lambda x: ("torch", x / 2))
    assert operator(4) == ("triton", 2)
    assert operator(5) == ("torch", 2.5)
    with pytest.raises(ZeroDivisionError):
        operator(2)


@pytest.mark.parametrize(
    ("environment", "argument", "expected"),
    [
        *((None, name, name) for name in BACKENDS),
        *((name, None, name) for name in BACKENDS),
        ("torch", "cpu", "cpu"),  # the argument wins
        *(("", None, "triton"), ("auto", None, "triton"), ("auto", "auto", "triton")),  # the choice is left open
    ],
)
def test_the_argument_or_else_the_environment_forces_a_backend(
    monkeypatch, available, double, environment, argument, expected
):
    if environment is not None:
        monkeypatch.setenv("G2G_BACKEND", environment)
    assert double(3, **({} if argument is None else {"backend": argument})) == (expected, 6)
    assert (forced_backend(argument) is None) == (argument != expected != environment)


def test_unknown_names_are_refused_and_say_where_they_come_from(monkeypatch, double):
    with pytest.raises(ValueError, match="backend='cuda' is not a backend; choose one of auto, triton, cpu, torch"):
        double(3, backend="cuda")
    monkeypatch.setenv("G2G_BACKEND", "Triton")
    with pytest.raises(ValueError, match="G2G_BACKEND='Triton' is not a backend; choose one of auto, triton, cpu"):
        double(3)
    with pytest.raises(ValueError, match="G2G_BACKEND='Triton'"):
        lif(torch.zeros(2, 3), 0.9, 1.0)


def test_a_forced_backend_that_cannot_serve_is_an_error_and_no_other_is_tried(monkeypatch, available):
    operator = Operator("half")
    operator.register("cpu", lambda x: x / 2, lambda x: "only even numbers")
    operator.register("torch", lambda x: x / 2)
    expected = r"^backend 'cpu' cannot serve this call of half: cpu: only even numbers$"
    with pytest.raises(BackendError, match=expected):
        operator(5, backend="cpu")
    monkeypatch.setenv("G2G_BACKEND", "cpu")
    with pytest.raises(BackendError, match=expected):
        operator(5)
    with pytest.raises(BackendError, match=r"^backend 'triton' cannot serve this call of half: triton: has no half$"):
        operator(5, backend="triton")


def test_when_nobody_serves_every_reason_is_listed_that_of_plain_pytorch_first(monkeypatch, available):
    operator = Operator("half")
    unavailable(monkeypatch, triton="no GPU here")
    operator.register("torch", lambda x: x / 2, lambda x: f"{x} is odd")
    reasons = "torch: 5 is odd; cpu: has no half; triton: no GPU here"  # what the caller can change comes first
    with pytest.raises(BackendError, match=f"^no backend serves this call of half: {reasons}$"):
        operator(5)


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registered backends, in their place."""
    monkeypatch.setattr(dispatch, "BACKENDS", dict(BACKENDS))
    return dispatch.BACKENDS


def test_register_backend_replaces_the_one_of_that_name_whose_status_is_told(available, registry):
    register_backend(registry["cpu"]._replace(unavailable=lambda: "the library does not load"))
    status = {"triton": None, "cpu": "the library does not load", "torch": None}
    assert [*backend_status().items()] == [*status.items()]
    assert available_backends() == ["triton", "torch"]
    register_backend(registry["cpu"]._replace(unavailable=lambda: None))
    assert available_backends() == list(registry) == ["triton", "cpu", "torch"]


def test_register_backend_adds_a_name_in_its_place(monkeypatch, available, double, registry):
    register_backend(Backend("units"))
    register_backend(Backend("first", lambda: "not built", preference=40))
    register_backend(Backend("shy", preference=50, only_by_name=lambda: "it is slow"))
    assert list(registry) == ["shy", "first", "triton", "cpu", "units", "torch"]
    assert backend_status()["first"] == "not built"
    for name in ("units", "shy"):
        double.register(name, lambda x, name=name: (name, x))
    assert double(3, backend="units") == ("units", 3)
    assert double(3, backend="shy") == ("shy", 3)
    assert double(3) == ("triton", 6)
    unavailable(monkeypatch, triton="no GPU", cpu="no compiler")
    assert double(3) == ("units", 3)


def test_require_backend(monkeypatch, available):
    unavailable(monkeypatch, triton="no GPU here")
    for name in (None, "cpu"):
        require_backend(name)
    message = "backend 'triton' is unavailable here: no GPU here; available: cpu, torch"
    with pytest.raises(BackendError, match=message):
        require_backend("triton")
    monkeypatch.setenv("G2G_BACKEND", "triton")
    with pytest.raises(BackendError, match=message):
        require_backend(None)
    with pytest.raises(ValueError, match="backend='gpu' is not a backend"):
        require_backend("gpu")


@pytest.fixture
def log(caplog):
    """The messages of g2g_kernels, as if nothing had been told yet."""

    def forget():
        for told in (dispatch._log_choice, dispatch._name_backend):
            told.cache_clear()

    forget()
    with caplog.at_level(logging.DEBUG, logger="g2g_kernels"):
        yield lambda level=logging.INFO: [
            record.getMessage() for record in caplog.records if (record.name, record.levelno) == ("g2g_kernels", level)
        ]
    forget()


def test_a_choice_is_logged_once_and_why_it_is_slow_only_where_nothing_is_compiled(monkeypatch, available, double, log):
    unavailable(monkeypatch, triton="no GPU here")
    for x in range(5):
        double(x)
    assert log() == ["Backend: compiled CPU kernels"]
    assert log(logging.DEBUG) == ["double runs by cpu (triton: no GPU here)"]
    unavailable(monkeypatch, triton="no GPU here", cpu="no compiler")
    for x in range(5):
        double(x)
    slow = "Backend of double: plain PyTorch, which is slower (triton: no GPU here; cpu: no compiler)"
    assert log()[1:] == [slow]


def test_each_operator_and_each_change_of_choice_is_logged(monkeypatch, available, double, log):
    other = Operator("other")
    other.register("cpu", lambda x: x)
    double(1)
    other(1)
    double(1, backend="torch")
    double(2)
    assert log() == ["Backend: compiled Triton kernels", "Backend: compiled CPU kernels", "Backend: plain PyTorch"]
    chosen = ["double runs by triton", "other runs by cpu (triton: has no other)"]
    assert log(logging.DEBUG) == [*chosen, "double runs by torch"]
