"""The doctor finds what is wrong, and says what it could not look at; so does the check at first use."""

import importlib
import json
import logging
import multiprocessing
import os

import pytest
import torch

from g2g_kernels import BlockMask, GroupLayout, dispatch, doctor, first_use, g2g_linear
from g2g_kernels.dispatch import BackendError, Way, backend_status
from g2g_kernels.ops import neurons as neurons_package
from g2g_kernels.ops.g2g_stack import WAYS, Connection, Population, g2g_stack
from g2g_kernels.ops.neurons import MODELS, Neurons, lif, neurons
from g2g_kernels.ops.neurons import operator as neurons_operator
from g2g_kernels.triton import runtime

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
    monkeypatch.setitem(neurons_operator.ways, "cpu", (Way("cpu", function, lambda *args: None),))


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
                assert 0.05 < tensor.mean() < 0.7, check.case  # 0.62 without a reset
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
    assert {len(finding) for finding in findings} == {len(neurons_package.SURROGATES)}  # all cases, in both precisions
    assert findings[0][0].startswith("reset subtract, surrogate atan: ")
    assert all(words in case for finding in findings for case in finding)


def test_a_backend_that_raises_is_a_finding_and_the_others_are_still_checked(monkeypatch, capsys):
    def raises(*arguments):
        raise RuntimeError("out of registers")

    cases = [check for check in CHECKS if check.operator in ("g2g_stack", "lif")]
    monkeypatch.setattr(doctor, "checks", lambda: iter(cases))
    monkeypatch.setattr(doctor, "available_backends", lambda: ["torch"])
    monkeypatch.setitem(WAYS.ways, "torch", (Way("reference", raises, lambda *args: None),))
    assert doctor.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "units of 64, index groups: RuntimeError: out of registers" in out
    assert "right" in next(line for line in out.splitlines() if line.split()[2:4] == ["lif", "float32"])


def test_what_a_backend_declines_is_told_and_is_no_failure(monkeypatch, capsys, only_lif):
    def refuses(current, *rest):
        return "only in float32" if current.dtype != torch.float32 else None

    monkeypatch.setitem(neurons_operator.ways, "cpu", (Way("cpu", neurons_package.reference.neurons, refuses),))
    assert doctor.main(["--device", "cpu"]) == 0
    assert "bfloat16  not served: only in float32" in capsys.readouterr().out
    with pytest.raises(BackendError):
        neurons_package.lif(torch.zeros(2, 3, dtype=torch.float16), 0.9, 1.0, backend="cpu")


INTERPRETED = runtime.interpreted() and runtime.unavailable() is None
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


@pytest.fixture
def new_process(monkeypatch, tmp_path, caplog):
    """Makes this process one that has used no Triton kernel and takes them by default: ``lif`` of ones on them."""
    monkeypatch.setenv("G2G_CHECK", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "checks", lambda: iter([check for check in CHECKS if check.operator == "lif"][:1]))
    by_default = dispatch.BACKENDS["triton"]._replace(only_by_name=lambda: None)
    monkeypatch.setitem(dispatch.BACKENDS, "triton", by_default)
    caplog.set_level(logging.INFO, logger="g2g_kernels")

    def run() -> tuple[bool, list[str]]:
        """Whether they served the call, and what the log says of them."""
        monkeypatch.setattr(first_use, "_found", {})
        caplog.clear()
        current, own = torch.ones(2, 1, 1), neurons_package.Neurons("lif", (torch.ones(1), torch.ones(1)))
        chosen = neurons_operator.choose(current, own, None)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert lif(current, 1.0, 1.5).flatten().tolist() == [0, 1]
        return (chosen.way is neurons_operator.ways["triton"][0], [
            message for message in caplog.messages if message.startswith(("Triton kernels", "What an earlier"))
        ])  # fmt: skip

    return run


@pytest.mark.ci
@needs_interpreter
def test_kernels_are_compared_before_their_first_use_once_for_a_card_its_versions_and_sources(
    new_process, monkeypatch, tmp_path
):
    served, said = new_process()
    assert served
    assert len(said) == 1
    assert "Triton kernels of neurons compared with plain PyTorch on Triton's interpreter, PyTorch 2." in said[0]
    assert f" s; kept in {tmp_path}" in said[0]
    assert new_process() == (True, [])  # the next process reads that
    for name in ("sources", "card"):
        with monkeypatch.context() as other:
            other.setattr(first_use, name, lambda *_: "another")
            assert len(new_process()[1]) == 1
            assert new_process() == (True, [])
    monkeypatch.setenv("G2G_CHECK", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert new_process() == (True, [])
    monkeypatch.setenv("G2G_CHECK", "1")


LINEAR, NEURONS, STACK = (f"g2g_kernels.ops.{name}.triton" for name in ("g2g_linear", "neurons", "g2g_stack"))
#: of each kernel: its module and an argument that it stores to; a check that finds it, and in what; the operator
FAULTS = {
    "product_kernel": (LINEAR, "y", "g2g_linear, float32, units of 64, index groups: y by ", "g2g_linear"),
    "place_kernel": (LINEAR, "every", "g2g_linear, float32, units of 1, interleaved groups: y by ", "g2g_linear"),
    "weight_gradient_kernel": (
        LINEAR, "grad_values", "g2g_linear, float32, units of 64, index groups: ∂values by ", "g2g_linear",
    ),
    "parts_kernel": (
        "g2g_kernels.triton.products", "parts", "g2g_linear, float32, units of 64, index groups: y by ", "g2g_linear",
    ),
    "neurons_forward_kernel": (
        NEURONS, "spikes", "lif, float32, reset subtract, surrogate atan: spikes differs", "neurons",
    ),
    "neurons_backward_kernel": (
        NEURONS, "grad_current", "lif, float32, reset subtract, surrogate atan: ∂current by ", "neurons",
    ),
    "fused_forward_kernel": (
        STACK, "counts", "fused stack, float16, units of 16, index groups: counts differs", "g2g_stack",
    ),
    "recurrent_backward_kernel": (
        STACK, "grad_current", "recurrent, float32, units of 64, index groups: ∂", "g2g_stack",
    ),
}  # fmt: skip


def plant(patch: pytest.MonkeyPatch, kernel: str) -> None:
    """Makes a kernel add one to the first number of what it stores."""
    module, stored, *_ = FAULTS[kernel]
    right = getattr(importlib.import_module(module), kernel)

    class Faulty:
        def __getitem__(self, grid):
            def run(**arguments) -> None:
                right[grid](**arguments)
                arguments[stored].view(-1)[0] += 1

            return run

    patch.setattr(f"{module}.{kernel}", Faulty())


@needs_interpreter
@pytest.mark.parametrize(
    "kernel", [pytest.param(name, marks=[pytest.mark.ci] if number > 1 else []) for number, name in enumerate(FAULTS)]
)
def test_kernels_that_are_wrong_are_not_used_and_a_warning_says_which(kernel, new_process, monkeypatch, caplog):
    *_, finding, operator = FAULTS[kernel]
    monkeypatch.setattr(
        doctor, "checks", lambda: (c for c in CHECKS if finding.startswith(c.operator) and c.case in finding)
    )
    mask, ones, own = (
        BlockMask.full(GroupLayout(2, 1), GroupLayout(2, 1)),
        torch.ones(2, 1, 2),
        Neurons("lif", (1.0, 1.0)),
    )
    weights = torch.ones(1, 2, 2)
    with monkeypatch.context() as faulty:
        plant(faulty, kernel)
        monkeypatch.setattr(first_use, "_found", {})
        if operator == "g2g_linear":
            result = g2g_linear(ones, weights, mask)
        elif operator == "neurons":
            result = 2 * neurons(2 * ones, own)
        else:
            result = (
                2 * g2g_stack(ones, [Population(own, (Connection("linear", weights, mask, -1),))]).spikes[0].dense()
            )
    assert torch.equal(result, 2 * ones)
    said = [record for record in caplog.records if record.message.startswith(f"Triton kernels of {operator} ")]
    assert [record.levelname for record in said] == ["INFO", "WARNING"]
    assert f"{operator} are not used, because they are wrong on Triton's interpreter" in said[1].message
    assert finding in said[1].message
    assert "report this line with the output of `python -m g2g_kernels.doctor`" in said[1].message


@needs_interpreter
def test_a_finding_is_known_to_the_next_process_and_the_other_operators_are_still_used(new_process, monkeypatch):
    with monkeypatch.context() as faulty:
        plant(faulty, "neurons_backward_kernel")
        assert not new_process()[0]
    with pytest.raises(BackendError, match=r"triton: its kernels failed the check at their first use \(lif, float32"):
        lif(torch.ones(2, 1, 1), 1.0, 1.5, backend="triton")
    assert first_use.refuses("g2g_linear", None) is None
    served, said = new_process()
    assert not served
    assert len(said) == 1
    monkeypatch.setenv("G2G_CHECK", "0")
    assert new_process() == (True, [])


@pytest.mark.ci
@needs_interpreter
@pytest.mark.parametrize("content", [b"[]", b"\xff", None], ids=str)
def test_a_finding_that_cannot_be_read_or_kept_stops_nothing(content, new_process, monkeypatch, tmp_path):
    if content is None:
        (tmp_path / "g2g").write_text("no folder")
    else:
        path = first_use._kept(("neurons", first_use.card(None)))
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    served, said = new_process()
    assert served
    assert said[0].startswith("What an earlier check of the Triton kernels found cannot be read (")
    assert ("this cannot be kept for the next process: " if content is None else "kept in") in said[1]
    assert len(new_process()[1]) == (2 if content is None else 0)


@needs_interpreter
def test_no_check_runs_while_calls_are_traced_or_captured_and_what_is_known_counts(new_process, monkeypatch):
    monkeypatch.setattr(first_use, "_check", lambda *_: pytest.fail("a check began"))
    x, compiled = torch.ones(2, 1, 1), torch.compile(lambda x: lif(x, 1.0, 1.5), backend="eager")
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        assert first_use.refuses("neurons", None) is None
    monkeypatch.setattr(first_use, "_found", {})
    assert compiled(x).flatten().tolist() == [0, 1]

    monkeypatch.setattr(first_use, "card", lambda index: f"card {index}")
    first_use._keep(("g2g_linear", "card 0"), "y differs")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert first_use.refuses("g2g_stack", 0) is None
    assert "failed the check at their first use (y differs)" in first_use.refuses("g2g_linear", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(pytest.fail.Exception, match="a check began"):  # with the first call after the capture
        first_use.refuses("g2g_stack", 0)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_that_start_together_end_right_and_leave_one_whole_finding(new_process, monkeypatch, tmp_path):
    forked = multiprocessing.get_context("fork")
    both = forked.Barrier(2)
    finding = "a spike too many"
    # each has found nothing in the cache, and writes when both have compared
    monkeypatch.setattr(doctor, "first_finding", lambda *_: (both.wait(60), finding)[1])
    started = [
        forked.Process(target=lambda: os._exit(finding not in (first_use.refuses("neurons", None) or "")))
        for _ in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    (kept,) = (tmp_path / "g2g" / "checks").iterdir()
    assert json.loads(kept.read_text(encoding="utf-8"))["found"] == finding
