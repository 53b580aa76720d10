"""The doctor finds what is wrong, and says what it could not look at."""

import pytest
import torch

from g2g_kernels import BackendError, backend_status, doctor
from g2g_kernels.ops import neurons as neurons_package
from g2g_kernels.ops.g2g_stack import operator as g2g_stack_operator
from g2g_kernels.ops.neurons import MODELS
from g2g_kernels.ops.neurons import operator as neurons_operator

CPU = torch.device("cpu")
EVERY = list(doctor.checks())  # whose references are computed once
DEFAULT_STEP = [check for check in EVERY if check.case == "a default step"]
CHECKS = [check for check in EVERY if check not in DEFAULT_STEP]  # those that take a second together
by_size = pytest.mark.parametrize(
    "checks", [CHECKS, pytest.param(DEFAULT_STEP, marks=pytest.mark.ci)], ids=["small", "a default step"]
)


@pytest.fixture(autouse=True)
def _checks_once(monkeypatch):
    monkeypatch.setattr(doctor, "checks", lambda: iter(CHECKS))


@pytest.fixture
def only_lif(monkeypatch):
    """The checks of ``lif`` alone, on the backend ``cpu`` alone."""
    cases = [check for check in CHECKS if check.operator == "lif"]
    monkeypatch.setattr(doctor, "checks", lambda: iter(cases))
    monkeypatch.setattr(doctor, "available_backends", lambda: ["cpu"])


def replace_lif(monkeypatch, function):
    monkeypatch.setitem(neurons_operator._implementations, "cpu", (function, lambda *args: None))


@by_size
def test_everything_on_this_machine_is_right(checks, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "checks", lambda: iter(checks))
    status, out = doctor.main(["--device", "cpu"]), capsys.readouterr().out
    assert status == 0, out
    assert "All checks passed" in out
    for name, reason in backend_status().items():
        assert f"  {name:<9} {f'no: {reason}' if reason else 'yes'}" in out
    rows = [line.split()[:4] for line in out.splitlines() if line.startswith("cpu  ")]
    for backend in set(doctor.available_backends()) - {"triton"}:
        for operator in ("g2g_linear", "g2g_stack", *MODELS) if checks is CHECKS else ["g2g_stack"]:
            for precision in ("float32", "bfloat16"):
                assert ["cpu", backend, operator, precision] in rows


def test_checks_cover_units_groups_resets_and_surrogates():
    for operator in ("g2g_linear", "g2g_stack", "fused stack"):
        checked = [check for check in CHECKS if check.operator == operator and "units" in check.case]
        masks = [mask for check in checked for mask in check.run.args[0]]
        assert {mask.block_size for mask in masks} == {1, 16, 32, 64}
        assert {mask.rows.layout.kind for mask in masks} == {"index", "interleaved", "random"}
        assert any(len(mask.rows.lengths.unique()) > 1 for mask in masks)  # clipped units
    for model in neurons_package.MODELS:
        options = [check.run.args for check in CHECKS if check.operator == model]
        assert {reset for _, reset, _ in options} == set(neurons_package.RESETS)
        assert {surrogate for _, _, surrogate in options} == set(neurons_package.SURROGATES)


@by_size
def test_neurons_are_neither_silent_nor_always_firing_in_any_check(checks):
    for check in checks:
        for name, tensor in check.reference.items():
            if name.startswith(("spikes", "rates")):
                assert 0.05 < tensor.mean() < 0.6, check.case
            assert tensor.any(), f"{check.case}: {name} is zero everywhere, and would be so if nobody computed it"


def test_a_wrong_gradient_is_reported(monkeypatch, capsys, only_lif):
    right = neurons_package.reference.neurons

    def another_sharpness(current, population, *rest):
        return right(current, population._replace(alpha=1.001 * population.alpha), *rest)

    replace_lif(monkeypatch, another_sharpness)
    assert doctor.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "reset zero, surrogate fast_sigmoid: ∂current by" in out
    assert "cases are WRONG" in out
    assert "is right" not in out


def one_spike_too_many(current, *rest):
    spikes, last = neurons_package.reference.neurons(current, *rest)
    extra = torch.zeros_like(spikes)
    extra[tuple((spikes == 0).nonzero()[0].tolist())] = 1
    return spikes + extra, last


def without_beta(current, population, *rest):
    beta, threshold = population.parameters
    detached = population._replace(parameters=(beta.detach(), threshold))
    return neurons_package.reference.neurons(current, detached, *rest)


def not_a_number(current, *rest):
    current.register_hook(lambda gradient: gradient * torch.nan)
    return neurons_package.reference.neurons(current, *rest)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(one_spike_too_many, "spikes differs"), (without_beta, "∂beta by inf"), (not_a_number, "∂current by inf")],
)
def test_wrong_spikes_and_gradients_that_are_missing_or_no_numbers_are_reported(wrong, words, monkeypatch, only_lif):
    replace_lif(monkeypatch, wrong)
    findings = [finding for _, finding in doctor.examine(CPU)]
    assert all(len(finding) == 5 for finding in findings)  # all cases, in both precisions
    assert findings[0][0].startswith("reset subtract, surrogate atan: ")
    assert all(words in case for finding in findings for case in finding)


def test_a_backend_that_raises_is_a_finding_and_the_others_are_still_checked(monkeypatch, capsys):
    def raises(*arguments):
        raise RuntimeError("out of registers")

    cases = [check for check in CHECKS if check.operator in ("g2g_stack", "lif")]
    monkeypatch.setattr(doctor, "checks", lambda: iter(cases))
    monkeypatch.setattr(doctor, "available_backends", lambda: ["torch"])
    monkeypatch.setitem(g2g_stack_operator._implementations, "torch", (raises, lambda *args: None))
    assert doctor.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "units of 64, index groups: RuntimeError: out of registers" in out
    assert "right" in next(line for line in out.splitlines() if "lif         float32" in line and "g2g" not in line)


def test_what_a_backend_declines_is_told_and_is_no_failure(monkeypatch, capsys, only_lif):
    def refuses(current, *rest):
        return "only in float32" if current.dtype != torch.float32 else None

    monkeypatch.setitem(neurons_operator._implementations, "cpu", (neurons_package.reference.neurons, refuses))
    assert doctor.main(["--device", "cpu"]) == 0
    assert "bfloat16  not served: only in float32" in capsys.readouterr().out
    with pytest.raises(BackendError):
        neurons_package.lif(torch.zeros(2, 3, dtype=torch.float16), 0.9, 1.0, backend="cpu")
