"""The benchmarks: who is let through to be timed, and what a record and its table say. No test looks at a time."""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, Largest, skip_where_refused
from processes import fork_contenders, hurry

import benchmarks.peers
import benchmarks.workload
from benchmarks import chunks, cli, records, reference, report, throughput
from benchmarks.contender import Contender
from benchmarks.correctness import Judge, Verdict, errors
from benchmarks.floor import floor_seconds, work
from benchmarks.harness import in_turn, turns
from benchmarks.ours import Network
from benchmarks.registry import KERNELS, Entry, choose, declared_peers, entries
from benchmarks.workload import Prepared, Workload, load, prepare
from g2gnet.dst.rules import GROW_RULES

TINY = Workload(batch_size=40, T=6, hidden_dim=48, block_size=8, dataset="fashionmnist-mini", train_steps=3)
FLAGS = "--batch_size 40 --T 6 --hidden_dim 48 --block_size 8 --dataset fashionmnist-mini --train_steps 3 --device cpu"
#: large enough that a hundredth is more than what bfloat16 does to a sum over neurons
LARGER = {"batch_size": 128, "hidden_dim": 512, "block_size": 64, "train_steps": 10}


#: of each kernel, results that every contender gives
RESULTS = {
    "step": {"loss", "counts", "fc1.weight", "fc2.weight", "fc3.weight", "fc3.bias"},
    "recurrent": {"counts", "fc1.weight", "rec1.weight", "rec2.weight"},
    "dst": {"fc1.correlation", "fc2.pruned", "fc3.grown"},
    "linear": {"y", "x", "weight", "bias", "weight as a whole"},
    "linear-dense": {"y", "x", "weight", "bias", "weight as a whole"},
    "lif": {"spikes", "membrane", "current", "beta", "threshold", "beta as a whole"},
    "synaptic": {"spikes", "membrane", "current", "syn_decay", "beta", "threshold", "syn_decay as a whole"},
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Prepared workloads of these tests go to a folder of their own."""
    folder = tmp_path_factory.mktemp("workloads")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setattr(benchmarks.workload, "cache_dir", lambda: folder)
        yield
    prepared.cache_clear()
    judge.cache_clear()


@functools.cache
def prepared(**changes) -> Prepared:
    """The tiny workload with changes."""
    return load(prepare(dataclasses.replace(TINY, **changes)))


@functools.cache
def judge(kernel: str, **changes) -> Judge:
    return Judge(prepared(**changes), kernel)


@pytest.fixture
def ours() -> Network:
    return Network(prepared(), torch.device("cpu"), "fp32", backend="torch")


def judged(contender: Contender, by: Judge, precision: str = "fp32", **changes) -> Verdict:
    results = {**contender.results(), **changes}
    return by.verdict(results, contender.reset, precision, contender.masked, contender.omits)


def built(entry: Entry, of: Prepared) -> Contender:
    if entry.unavailable:
        pytest.skip(entry.unavailable)
    module, _, name = entry.target.partition(":")
    kind = getattr(importlib.import_module(module), name)
    # everything that a compiler does before it writes machine code
    options = {**entry.options, "compiler": "aot_eager"} if entry.compiles else entry.options
    try:
        return kind(of, torch.device("cpu"), entry.precision, **options)
    except ValueError as refusal:  # of a library that has no bfloat16
        if entry.backend:
            raise
        pytest.skip(str(refusal))


def on_a_cpu(kernel: str) -> list:
    """Those that can be run there; of those that compile, one precision is enough here.

    One that is compiled takes as long as ten others: ours are in the lane ``ci``, peers in the longest one.
    """
    found = []
    for label, entry in entries(kernel).items():
        lane = "ci" if entry.backend else "long"
        marks = [getattr(pytest.mark, lane)] if entry.compiles or label == "jax-masked-bf16" else []
        once = entry.precision == "bf16" and (entry.compiles or label.startswith("bsr"))
        if "triton" not in label and not once:
            found.append(pytest.param(kernel, label, marks=marks))
    return found


def test_the_peer_of_the_readme_is_one_file_and_passes_the_gate(tmp_path, monkeypatch):
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "benchmarks/README.md").read_text())
    (tmp_path / "plain.py").write_text(code)
    monkeypatch.setattr(benchmarks.peers, "__path__", [*benchmarks.peers.__path__, str(tmp_path)])
    assert "plain" not in entries("step")
    assert {"plain", "plain-bf16"} <= entries("linear").keys()
    contender = built(entries("linear")["plain"], prepared())
    assert type(contender).__module__ == "benchmarks.peers.plain"
    assert not judged(contender, judge("linear")).objection


def test_the_baseline_is_the_first_peer():
    for kernel, about in KERNELS.items():
        peers = [entry for entry in entries(kernel).values() if entry.backend is None]
        assert peers[0].label == about.baseline
        modules = {f"benchmarks.peers.{module}" for module, *_, kernels, _ in declared_peers() if kernel in kernels}
        assert {peer.target.partition(":")[0] for peer in peers} == modules


@pytest.mark.filterwarnings("default")  # importing a peer is not ours to keep free of warnings
@pytest.mark.parametrize(("kernel", "label"), [each for kernel in RESULTS for each in on_a_cpu(kernel)])
def test_every_contender_passes_the_gate(kernel, label):
    chosen = entries(kernel)[label]
    if chosen.compiles and torch.__version__ < (2, 5):
        pytest.skip("PyTorch 2.4 cannot compile snnTorch's neurons as one graph")
    changes = {**KERNELS[kernel].workload, **chosen.workload}
    neurons = kernel in ("lif", "synaptic")  # a backend may have none alone
    with skip_where_refused() if neurons else contextlib.nullcontext():
        contender = built(chosen, prepared(**changes))
        start = contender.units() if kernel == "dst" else []
        for _ in range(2 if kernel == "dst" else 1):  # a turn begins where the one before it began
            verdict = judged(contender, judge(kernel, **changes), chosen.precision)
            assert not verdict.objection
    assert verdict.errors.keys() >= {name for name in RESULTS[kernel] if name.split()[0] not in contender.omits}
    if kernel.startswith("linear"):
        (rate,) = contender.firing_rates({})
        assert rate == 1.0 if kernel == "linear-dense" else rate < 0.5
    if start:
        assert any(not torch.equal(*grids) for grids in zip(start, contender.units(), strict=True))
    if "triangle" in label:
        assert "surrogate triangle, alpha 4" in contender.differs
        contender.net.load_state_dict(prepared().network().state_dict())
        assert "fc1.weight is off" in judged(contender, judge(kernel), chosen.precision).objection


@pytest.mark.parametrize("model", ["random", "mixer"])
@pytest.mark.filterwarnings("default")
def test_peers_that_know_of_units_follow_any_grouping(model):
    changes = {"model": model, "train_steps": 1}
    for kernel, label in (("step", "bsr-lif"), ("dst", "dense-correlation")):
        assert not judged(built(entries(kernel)[label], prepared(**changes)), judge(kernel, **changes)).objection


def spoilt(kernel: str, contender: Contender) -> dict:
    """Has it compute something else, or what its results are instead."""
    match kernel:
        case "dst":
            contender.scheduler.grow = GROW_RULES["random"]
        case "linear":  # an error of 2e-4, which a network's results may have
            return {"x": contender.results()["x"].half().float()}
        case "synaptic":
            contender.parameters["syn_decay"].data += 0.01
        case "recurrent":
            contender.net.rec1.values.data *= 0.9
    return {}


@pytest.mark.parametrize(
    ("kernel", "off"), [("dst", "fc2.grown"), ("linear", "x"), ("synaptic", ""), ("recurrent", "")]
)
def test_a_contender_that_computes_something_else_has_no_time(kernel, off):
    changes = KERNELS[kernel].workload
    contender, by = built(entries(kernel)["g2g-torch"], prepared(**changes)), judge(kernel, **changes)
    assert not judged(contender, by).objection
    assert f"{off} is off by" in judged(contender, by, **spoilt(kernel, contender)).objection


def test_the_gate_refuses_the_other_reset_and_what_is_off_by_one_in_ten_thousand_or_not_finite(ours):
    results = ours.results()
    for reset, wrong in (("after decay", False), ("before decay", True)):
        assert bool(judge("step").verdict(results, reset, "fp32", True, ()).objection) == wrong
    for name in ("loss", "counts", "fc1.weight", "fc2.bias", "lif3.beta"):
        for change in (0.9999, math.nan):
            objection = judged(ours, judge("step"), **{**results, name: results[name] * change}).objection
            assert objection.startswith(f"{name} is off by ")
            assert "nan" in objection or not math.isnan(change)


@pytest.mark.ci
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("label", ["g2g-cpu-bf16", "g2g-torch-bf16", "snntorch-masked-bf16"])
def test_a_hundredth_of_a_bfloat16_gradient_is_found(label):
    contender, by = built(entries("step")[label], prepared(**LARGER)), judge("step", **LARGER)
    results = contender.results()
    assert not judged(contender, by, "bf16", **results).objection
    for name in (f"fc{number}.{kind}" for number in (1, 2, 3) for kind in ("weight", "bias")):
        for change in (0.99, 1.01):
            changed = {**results, name: results[name] * change}
            assert f"{name} as a whole is off" in judged(contender, by, "bf16", **changed).objection
        part = results[name].clone()
        part[: len(part) // 3] *= 1.1
        assert f"{name} is off" in judged(contender, by, "bf16", **{**results, name: part}).objection


@pytest.mark.parametrize("recurrent", [False, True])
def test_samples_with_other_spikes_alone_are_computed_anew(recurrent, monkeypatch):
    of_weights = prepared(recurrent=recurrent)
    by = Judge(of_weights, "recurrent")
    spikes = reference.network_results(of_weights, precision="fp32").spikes
    by._replay("after decay", spikes)
    other = {layer: train.clone() for layer, train in spikes.items()}
    for sample in (3, 39):
        other["lif1.spikes"][:, sample] ^= True
        other["lif2.spikes"][-1, sample] ^= True
    whole = reference.network_results(of_weights, given=other)
    monkeypatch.setattr(Judge, "_run", lambda *_: pytest.fail("all samples were computed"))
    found = by._replay("after decay", other)
    assert all(errors(found.results[each], whole.results[each]).single < 1e-12 for each in whole.results)
    assert all(torch.allclose(found.denied[layer], whole.denied[layer], rtol=1e-9) for layer in spikes)


def test_the_gate_wants_every_result_its_shape_zeros_outside_the_mask_and_spikes_of_membranes(ours):
    results = ours.results()

    def objection(**changes) -> str:
        return judged(ours, judge("step"), **changes).objection

    spikes = results["lif2.spikes"].clone()
    spikes[-1, 0, 0] ^= True  # the last step changes no membrane of its own layer
    assert objection(**{"lif2.spikes": spikes}).startswith("lif2.membrane is off by ")
    wrong = objection(**{"lif1.spikes": results["lif1.spikes"][1:]})
    assert wrong == "lif1.spikes is [5, 40, 48], not [6, 40, 48]"
    weight = results["fc2.weight"]  # its gradient outside of the mask is an error unless the contender is dense
    stray = torch.where(prepared().network().fc2.mask.to_dense(), weight, weight.abs().mean())
    assert "fc2.weight is off" in objection(**{"fc2.weight": stray})
    del results["lif1.spikes"]
    verdict = judge("step").verdict(results, "after decay", "fp32", True, ())
    assert verdict.objection.startswith("does not give ['lif1.spikes']")
    larger = Network(prepared(**LARGER), torch.device("cpu"), "bf16", backend="torch")
    with torch.no_grad():
        larger.net.lif1.beta.sub_(0.02)  # no membrane is far off, but many spikes are
    assert judged(larger, judge("step", **LARGER), "bf16").objection.startswith("lif1.spikes is off by ")


@pytest.mark.parametrize("precision", ["float64", "bf16"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_units_give_what_dense_weights_give(recurrent, precision, monkeypatch):
    of_weights = prepared(recurrent=recurrent)  # 784 inputs in eight groups: ragged units
    dense, spikes, _ = reference.network_results(of_weights, precision=precision)
    monkeypatch.setattr(reference, "DENSE_UP_TO", 16)
    by_units = reference.network_results(of_weights, precision=precision, given=spikes).results
    assert by_units.keys() == dense.keys()
    masks = {f"{name}.weight": layer.mask for name, layer in of_weights.network().connections().items()}
    for name, tensor in by_units.items():
        unpacked = masks[name].unpack(tensor) if name in masks else tensor
        exact = dense[name] * masks[name].to_dense() if name in masks else dense[name]
        assert errors(unpacked, exact).single < (1e-12 if precision == "float64" else 0.02), name


@pytest.mark.ci
def test_a_wide_network_is_judged_without_dense_weights(monkeypatch):
    monkeypatch.setattr(reference, "DENSE_UP_TO", 16)
    of_weights = prepared(hidden_dim=512, num_groups=64, p_inter=0.0, train_steps=0)
    with Largest() as largest:
        assert work(of_weights, "step")["flop"]
        contender = built(entries("step")["g2g-cpu"], of_weights)
        assert not judged(contender, Judge(of_weights, "step")).objection
    assert largest.numel < 512**2


def test_the_error_of_a_sum_is_measured_by_its_terms():
    terms = torch.tensor([5.0, -5.0, 0.1])
    for actual in (0.2, [0.2], [5.0, -5.0, 0.2]):  # one for all neurons is of shape [] or [1]
        assert errors(torch.tensor(actual), terms).single == pytest.approx(0.1 / 10.1)
    assert math.isnan(errors(torch.zeros(2), terms).single)


def test_a_step_leaves_the_network_as_it_was_checked(ours):
    before = {name: tensor.clone() for name, tensor in ours.net.state_dict().items()}
    ours.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.net.state_dict().items())
    assert any(state["exp_avg"].any() for state in ours.optimizer.state.values())  # Adam did its work


@pytest.mark.long
def test_a_step_of_jax_is_one_of_pytorch():
    """Its Adam too, which has a learning rate of zero while it is timed."""
    pytest.importorskip("jax")
    jax, torch_ = (built(entries("step")[name], prepared()) for name in ("jax-masked", "snntorch-masked"))
    jax.rate = torch_.optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(3):
        jax.step()
        torch_.step()
    for name, parameter in torch_.net.named_parameters():
        torch.testing.assert_close(torch.from_numpy(np.array(jax.parameters[name])), parameter.detach())


@pytest.mark.ci
def test_only_a_right_contender_has_a_time(monkeypatch):
    fork_contenders(monkeypatch)
    kinds = {"right": "Network", "wrong": "HalfTheGradient", "unable": "CannotBeBuilt", "absent": "Network"}
    reasons = {"absent": "absent is not installed (pip install absent)"}
    jobs = [
        Entry(name, f"wrong_contenders:{kind}", options={"backend": "torch"}, unavailable=reasons.get(name))
        for name, kind in kinds.items()
    ]
    outcomes = throughput.measure("step", [(entry, prepare(TINY)) for entry in jobs], repeats=3, warm_up=1)
    right, wrong, unable, absent = outcomes
    assert [outcome.status for outcome in outcomes] == ["timed", "wrong", "refused", "skipped"]
    assert [len(outcome.seconds) for outcome in outcomes] == [3, 0, 0, 0]
    assert right.peak_bytes is not None
    assert len(right.run["firing_rates"]) == 3
    assert wrong.reason.startswith("lif1.threshold is off by ")
    assert "there is no such instruction here" in unable.reason
    runs = [{"place": 0, **outcome.summary()} for outcome in outcomes]
    workloads = [{"x": None, "flop": 9, "floor_seconds": 1e-6}]
    table = report.text({"runs": runs, "baseline": "right", "quantity": None, "workloads": workloads})
    assert re.search(r"^right .* 1 ", table, re.MULTILINE)
    for outcome in (wrong, unable, absent):
        assert f"{outcome.status}: {outcome.reason}" in table


def test_each_round_is_begun_by_the_next_one():
    rounds = [""] * 4
    for number, _, racer in turns("abc", 4):
        rounds[number] += racer
    assert rounds == ["abc", "bca", "cab", "abc"]
    numbers = iter(range(9))
    assert in_turn(dict.fromkeys("ab", lambda: next(numbers)), 2) == {"a": [3, 4], "b": [2, 5]}


@pytest.mark.parametrize(
    "forked", [pytest.param(True, marks=pytest.mark.ci), pytest.param(False, marks=pytest.mark.long)]
)
def test_throughput_writes_a_record_with_its_environment(forked, tmp_path, capsys, monkeypatch):
    prepared()
    if forked:
        fork_contenders(monkeypatch)
    flags = [*FLAGS.split(), "--kernel", "forward", "--contenders", "g2g-torch"]
    assert throughput.main([*flags, "--repeats", "2", "--json", str(tmp_path / "record.jsonl")]) == 0
    record = records.read(tmp_path / "record.jsonl")
    assert record["workloads"][0]["hidden_dim"] == 48
    assert {"cpu", "cores", "threads", "gpu", "python", "versions", "commit", "date"} <= record["machine"].keys()
    assert record["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["machine"]["cpu"]
    assert record["limits"].keys() >= {"matrix_flop_per_s", "copy_bytes_per_s"}
    (run,) = record["runs"]
    assert (run["repeats"], run["place"]) == (2, 0)
    assert min(run["first_seconds"], run["median"]) > 0
    assert re.fullmatch(r"\S+e\S+ ≤ \S+e\S+, \S.*", run["closest"])
    assert "g2g-torch" in capsys.readouterr().out
    before = {**record, "machine": {"commit": "0123456789"}, "runs": [{**run, "median": 2 * run["median"]}]}
    assert re.search(r"since 01234567 +was +is\n.*\ng2g-torch .* 0\.50×", report.compared(record["runs"], before))
    (tmp_path / "other.jsonl").write_text(records.text({**before, "kernel": "step"}))
    assert throughput.main([*flags, "--before", str(tmp_path / "other.jsonl")]) == 2
    assert "other.jsonl is of ['step', {" in capsys.readouterr().err


def test_a_wrong_run_is_the_exit_status_and_quick_changes_what_is_not_given(capsys):
    asked = []

    def benchmark(arguments):
        asked.append(arguments.T)
        return {"runs": [{"status": "wrong" if arguments.T == 4 else "timed"}]}

    program = cli.Program("x", "About x.", "a day", benchmark, str, {"T": (9, "steps")}, {"T": 3})
    given = ([], ["--quick"], ["--quick", "--T", "5"], ["--T", "4"])
    assert [program.main(flags) for flags in given] == [0, 0, 0, 1]
    assert asked == [9, 3, 5, 4]
    capsys.readouterr()
    assert program.main(["--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:] == [{"status": "timed"}]
    for each in (throughput.PROGRAM, chunks.PROGRAM):
        help_ = each.build_parser().format_help()
        assert re.search(r"It takes about \w+ minutes", help_)
        assert "--quick" in help_


def test_unusable_flags_are_refused(capsys):
    for flags, message in {
        "--contenders g2g-torch,nobody": "contender 'nobody' is unknown; --kernel step has g2g-triton, g2g-cpu",
        "--kernel lif --contenders snntorch-masked": "contender 'snntorch-masked' is unknown; --kernel lif has",
        "--backend cpu,gpu": "backend 'gpu' is unknown; g2g has triton, cpu, torch",
        "--kernel lif --precision bf16": "precision='bf16': --kernel lif is measured in fp32 only",
        "--contenders g2g-torch --backend cpu": "contenders='g2g-torch' already names backend and precision",
        "--p_inter 1.5": "p_inter=1.5 must be",
        "--repeats 0": "repeats=0 must be",
        "--train_steps -1": "train_steps=-1 must be",
        "--device tpu": "device='tpu' is unknown",
        "--quantity T --values 3,3": "values='3,3': a line needs at least two different values",
        "--values 3,4": "values need a quantity; give --quantity, too",
    }.items():
        assert throughput.main(["--device", "cpu", *flags.split()]) == 2
        assert message in capsys.readouterr().err


def test_a_workload_is_prepared_once_and_its_work_counts_active_weights():
    path, of = prepare(TINY), prepared()
    assert prepare(TINY, on_step=lambda steps: pytest.fail("trained again")) == path
    assert dataclasses.replace(TINY, seed=1).path != path
    assert not torch.equal(prepared(train_steps=0).network().fc2.values, of.network().fc2.values)
    first, second, third = of.active_weights().values()
    assert first + second + third == pytest.approx(of.density() * (784 * 48 + 48 * 48 + 48 * 10))
    assert work(of, "step")["flop"] == 4 * 40 * first + 6 * 40 * 6 * (second + third)
    assert work(of, "forward")["flop"] == 2 * 40 * first + 2 * 40 * 6 * (second + third)
    assert work(of, "lif") == {"flop": 0, "bytes": 5 * 4 * 40 * 6 * 48}
    assert work(of, "linear") == {"flop": 6 * 40 * 6 * second, "bytes": 5 * 4 * 40 * 6 * 48}
    assert work(of, "dst") == {"flop": 0, "bytes": 4 * (40 * 6 * (48 + 48 + 10) + 40 * 784)}
    assert floor_seconds({"flop": 10, "bytes": 6}, {"matrix_flop_per_s": 5.0, "copy_bytes_per_s": 3.0}) == 4.0


def test_contenders_are_chosen_by_backend_and_precision_and_say_what_they_lack(monkeypatch):
    default = {entry.label for entry in choose("step")}
    assert default >= {"g2g-torch", "g2g-triton", "snntorch-masked", "dense-lif", "compiled-masked", "bsr-lif"}
    assert not default & {"snntorch-masked-bf16", "g2g-triton-pair", "g2g-cpu-compiled"}
    labels = [entry.label for entry in choose("linear", backends="torch", precision="bf16")]
    assert labels == ["g2g-torch-bf16", "masked-bf16", "bsr-bf16", "dense-bf16", "sparselab-bf16"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "snntorch" else object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert entries("step")["snntorch-dense"].unavailable == "snntorch is not installed (pip install snntorch)"
    assert entries("step")["spikingjelly-dense"].unavailable is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "torch.compile needs a C++ compiler" in entries("step")["compiled-dense"].unavailable
