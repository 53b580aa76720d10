"""The smaller programs of measurement: what each times, counts and records, and what it refuses."""

import functools
import importlib.util

import numpy as np
import pytest
import torch
from processes import fork_contenders

from benchmarks import brain, chunks, cpu_choices, delays, first_run, host_time, images, records, redraw, second
from benchmarks.first_run import Stage, stages
from benchmarks.host_time import CASES, Case, Contender, PlainLoop, tiny
from benchmarks.registry import choose
from g2g_kernels.cpu import library
from g2gnet import G2GNet

needs_triton = pytest.mark.usefixtures("triton")
needs_kernels = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


@pytest.fixture
def triton():
    return pytest.importorskip("triton", minversion="3.3")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The record that a program writes, given these flags."""
    fork_contenders(monkeypatch)

    def run(program, flags: str) -> dict:
        assert program.main([*flags.split(), "--json", str(tmp_path / "record.jsonl")]) == 0
        return records.read(tmp_path / "record.jsonl")

    return run


def test_what_is_out_of_range_is_refused(capsys, tmp_path):
    of_chunks = [(chunks, flags, flags.split()[1][-1]) for flags in ("--T 0", "--chunk 0", "--chunks 5,0", "--T a")]
    for program, flags, message in (
        *of_chunks,
        (host_time, "--turns 0", "turns=0 must be"),
        (first_run, f"--device cpu --folder {tmp_path} --stages speed", "stage 'speed' is unknown; choose from doctor"),
        (first_run, f"--device xpu --folder {tmp_path}", "device='xpu': no such GPU was found; --device cpu runs a"),
    ):
        assert program.main(flags.split()) != 0
        assert message in capsys.readouterr().err


@pytest.mark.ci
def test_steps_in_chunks_are_timed_and_weighed_beside_the_whole(tmp_path, capsys, monkeypatch, recorded):
    monkeypatch.setattr(chunks, "USUAL", 4)
    flags = "--T 4,6 --chunks 2 --chunk 3 --long 8 --hidden_dim 16 --batch_size 3 --repeats 1"
    record = recorded(chunks, flags)
    points = {(point["T"], point["chunk"]): point for point in record["runs"]}
    assert list(points) == [(4, None), (4, 2), (4, 3), (6, None), (6, 3), (8, 3)]
    assert all(point["median"] > 0 and point["peak_bytes"] >= 0 for point in points.values())
    assert points[4, 2]["differs"] <= chunks.ALLOWED
    assert points[4, None]["times"] == 1
    assert "times" not in points[8, 3]  # nothing is beside it
    assert points[6, 3]["times"] > 0
    assert "| 8 | 3 |" in capsys.readouterr().out
    drawn = redraw._chunks(redraw.Record(tmp_path / "record.jsonl", record))
    assert "[record](record.jsonl)" in redraw._linked(drawn, tmp_path)
    expected = {"counts": np.ones(3), "fc1.values": np.array([3.0, 4.0])}  # another result is wrong
    assert chunks.difference(expected, expected) == 0
    assert chunks.difference({**expected, "fc1.values": np.array([3.0, 4.5])}, expected) == pytest.approx(0.1)
    assert chunks.difference({**expected, "counts": np.zeros(3)}, expected) == float("inf")


@needs_kernels
def test_each_way_is_timed_beside_the_chosen_one(monkeypatch, recorded):
    points = [cpu_choices.Point(16, 0.1, 0.2, 5, 32), cpu_choices.Point(1, 0.1, 0.2, 5, 32)]
    monkeypatch.setattr(cpu_choices, "grid", lambda: iter(points))
    runs = recorded(cpu_choices, "--size 256 --repeats 2")["runs"]
    found = {(point["unit"], point["pass"]): point for point in runs}
    assert len(found) == 2 * len(cpu_choices.PASSES)
    for (unit, name), point in found.items():
        wanted = {"events", "tiles"}
        if "two layers" in name:
            wanted = {"needed", "tiles"} if "per neuron" in name else {"needed", *wanted}
        elif not name.startswith("inputs"):
            wanted |= {"sums" if unit == 16 else "batch"}
        assert set(point["ms"]) == wanted, (unit, name)
        if point["chosen"]:
            assert point["over"] == point["ms"][point["chosen"]] / min(point["ms"].values())
    assert library.SUBSET_COST == 1.0, "what was forced stays"


def test_slow_choices_are_listed():
    point = cpu_choices.Point(16, 0.1, 0.2, 5, 32)._asdict() | {"pass": "forward", "ms": {"events": 1.0, "sums": 1.1}}
    text = cpu_choices.table(
        {"runs": [point | {"chosen": "sums", "over": 1.1}, point | {"chosen": "events", "over": 1}]}
    )
    assert text.startswith("Of 2 passes 1 take more than 1.03 times the fastest way")
    assert "| forward | sums | events 1.00, sums 1.10 | 1.10 |" in text


DELAYED = "--hidden_dim 32 --block_size 4 --batch_size 4 --T 6 --delay 3 --repeats 2"


def test_every_network_and_the_loop_count_the_same_spikes(capsys, monkeypatch, recorded):
    record = recorded(delays, DELAYED)
    names = [*delays.NETWORKS, delays.LOOP]
    assert [run["name"] for run in record["runs"]] == names
    assert all(run["equal"] == 1 and len(run["seconds"]) == 2 for run in record["runs"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("|")][2:] == names
    monkeypatch.setattr(delays, "loop", lambda net, x: net(x) + 1)
    assert delays.main(DELAYED.split()) == 1  # counts are wrong


@needs_triton
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_small_network_launches_what_the_default_one_does(precision):
    from benchmarks.aot import training_step
    from benchmarks.contender import FORMATS

    (contender := Contender(Case("default", "triton", precision))).turn(1)
    default = training_step(G2GNet(784, 2048, 10, "index", T=50), 256, 784, FORMATS[precision])
    assert [each.kernel.fn.__name__ for each in contender.launches] == [each.kernel.fn.__name__ for each in default]


def test_the_plain_loop_is_the_same_network():
    stack = tiny("cpu")
    x = 5 * torch.rand(4, 32, generator=torch.Generator().manual_seed(1))
    counts = PlainLoop(stack)(x)
    assert counts.sum() > 0
    assert torch.equal(counts, stack(x))


@needs_triton
def test_every_part_of_every_case_has_a_time(capsys, monkeypatch, recorded):
    monkeypatch.setattr(host_time, "TURN", 2)
    rows = recorded(host_time, "--turns 2 --warm_up 1")["runs"]
    assert {(row["network"], row["backend"], row["precision"]) for row in rows} == set(CASES)
    assert len(rows) == len(CASES) * 6
    assert all(0 < row["least"] <= row["median"] < 60 for row in rows)
    assert "default, triton, bf16" in capsys.readouterr().out


BRAIN = "--neurons 300 --weights 3000 --batch_size 2 --T 5 --repeats 1 --contenders"


@needs_kernels
@pytest.mark.parametrize("name", ["g2g-cpu", "csr-by-hand"])
def test_a_contender_is_that_of_float64(monkeypatch, name):
    monkeypatch.setattr(library, "LIST_COST", 0.0)
    monkeypatch.setattr(brain, "CHECKED", 300)
    assert brain.farthest(name) < 1e-5

    def wrong(*given):
        step = right(*given)
        return lambda: (lambda counts, weights, x: (counts, 1.001 * weights, x))(*step())

    right = brain.CONTENDERS[name]
    monkeypatch.setitem(brain.CONTENDERS, name, wrong)
    assert brain.farthest(name) > brain.CLOSE


@pytest.mark.parametrize("label", ["g2g-cpu", "g2g-cpu-triangle", "snntorch"])
@pytest.mark.parametrize("held", [False, True])
def test_a_step_of_images_is_compared_with_float64_and_what_is_off_has_no_time(label, held):
    blocks = images.Block(4, 3, 1, after=held), images.Block(5, 3, before=not held), images.Block(10, before=held)
    network = images.Network((2, 13, 12), blocks, steps=4, samples=5, held=False, gain=4.0)
    if held:
        network = network._replace(shape=(1, 28, 28), held=True)
    _, turn = images.session(network, label)
    results = {name: torch.as_tensor(each) for name, each in turn.results().items()}
    assert all(each.float().mean() > 0 for name, each in results.items() if "spikes" in name)
    form = images.FORMS[label]
    judge = images.ImageJudge(images.prepare(network), form.surrogate)
    verdict = functools.partial(judge.verdict, reset=form.reset, precision=form.precision, masked=True, omits=())
    assert not verdict(results).objection
    for name in ("1.weight", "2.bias"):
        assert verdict({**results, name: results[name] * 1.001}).objection.startswith(f"{name} is off by")
    others = {**results, "2.spikes": ~results["2.spikes"]}
    assert "2.spikes is off by" in verdict(others).objection


@needs_kernels
@pytest.mark.ci
def test_a_second_of_a_brain_has_equal_spikes_with_and_without_gradients(recorded, monkeypatch):
    monkeypatch.setattr(library, "LIST_COST", 0.0)
    monkeypatch.setattr(second, "TRIALS", 3)
    record = recorded(brain, "--second --neurons 400 --weights 8000 --T 12 --repeats 1")
    runs = {run["name"]: run for run in record["runs"]}
    assert list(runs) == [*second.CONTENDERS]
    spikes = {name: run["spikes"] for name, run in runs.items() if run["seconds"]}
    assert 0 < spikes["forward"] < spikes["trials"]
    alike = spikes.keys() & {"forward", "gradients", "brian2"}
    assert {spikes[name] for name in alike} == {spikes["forward"]}
    assert second.CONTENDERS["gradients"][3] in brain.table(record)


def test_edges_of_a_file_are_the_graph(tmp_path):
    pandas = pytest.importorskip("pandas")
    columns = {"pre_root_id": [9000, 9000, 9001, 9000], "post_root_id": [9001, 9002, 9000, 9001]}
    more = {"syn_count": [5, 10, 2, 3], "nt_type": ["ACH", "GABA", "ACH", "ACH"]}
    pandas.DataFrame(columns | more).to_csv(tmp_path / "edges.csv.gz", index=False)
    graph = brain.from_file(str(tmp_path / "edges.csv.gz"))
    dense = np.zeros((3, 3), np.float32)
    dense[graph.post, graph.pre] = graph.weight
    assert np.allclose(dense, np.array([[0, 2, 0], [8, 0, 0], [-10, 0, 0]], np.float32) * 0.001)
    for name, content, why in (
        ("other", b"a\n1\n", "has the columns"),
        ("missing", b"pre,post,weight\n0,1,\n", "is missing"),
        ("nothing", b"", "cannot be read"),
        ("bytes", bytes(range(256)), "cannot be read"),
    ):
        (tmp_path / f"{name}.csv").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.csv .*{why}"):
            brain.from_file(str(tmp_path / f"{name}.csv"))
    assert brain.main(["--edges", str(tmp_path / "nothing.csv")]) == 2


@pytest.mark.ci
@needs_kernels
def test_the_table_has_a_row_each_and_says_what_failed(monkeypatch, capsys, recorded):
    runs = {run["name"]: run for run in recorded(brain, f"{BRAIN} g2g-cpu,csr-by-hand")["runs"]}
    assert all(run["status"] == "timed" and len(run["seconds"]) == 1 and run["off"] < 1e-4 for run in runs.values())
    assert torch.tensor([run["rate"] for run in runs.values()]).diff().abs() < 1e-3
    runs["csr-by-hand"] |= {"status": "failed", "reason": "not enough memory"}
    assert "fails: not enough memory" in brain.table({"runs": [*runs.values()]})
    assert brain.main([*BRAIN.split(), "none"]) == 2
    assert "'none' is unknown" in capsys.readouterr().err
    monkeypatch.setattr(brain, "CLOSE", 0.0)
    assert brain.main([*BRAIN.split(), "csr-by-hand"]) == 1


def test_growth_is_fitted_to_weights_and_neurons():
    runs = [
        {"status": "ok", "neurons": n, "weights": w, "seconds": [2e-9 * w + 3e-6 * n], "base": 10**8}
        | {"peak": 10**8 + 40 * w + 500 * n}
        for w, n in ((10**5, 10**4), (10**6, 3 * 10**4), (10**7, 10**5))
    ]
    text = brain.growth_table({"runs": runs})
    assert "time grows by 2 ns per weight and 3e+03 ns per neuron" in text
    assert "memory grows by 40 bytes per weight and 500 bytes per neuron" in text


#: a stage of a GPU's first hour that notes that it ran, does what it is told, and writes a record
PROGRAM = """
import json, os, pathlib, signal, sys, time
what, json_flag, record = sys.argv[1:]
with open("log", "a") as log:
    log.write(what + " ")
if what == "stopped" and pathlib.Path("log").read_text().count("stopped") == 1:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
print("one line", flush=True)
if what == "failing":
    sys.exit("a reason | in words")
pathlib.Path(record).write_text("{}\\n" + json.dumps({"contender": what, "median": 0.002}))
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_is_a_program_that_takes_its_flags(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for stage in stages(device):
        package, _, name = stage.command[0].rpartition(".")
        assert importlib.util.find_spec(stage.command[0])
        assert stage.measures == (package == "benchmarks")
        if stage.measures:
            arguments = importlib.import_module(stage.command[0]).build_parser().parse_args(stage.command[1:])
            assert name != "throughput" or choose(arguments.kernel, arguments.contenders)
    few = {"doctor", "step", "lif", "dst", "step-units-1", "scaling-B-bf16", "processes"}
    assert few <= {stage.name for stage in stages(device)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "processes" not in {stage.name for stage in stages("cuda")}


@pytest.fixture
def staged(tmp_path, monkeypatch, capsys):
    """Runs the program above as these stages."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run_stages(**stages: str) -> tuple[int, str, str]:
        made = [Stage(name, ("program", of)) for name, of in stages.items()]
        monkeypatch.setattr(first_run, "stages", lambda _: made)
        status = first_run.main(["--device", "cpu", "--folder", "run"])
        written = capsys.readouterr()
        return status, written.out + written.err, (tmp_path / "run/first-run.md").read_text()

    return run_stages


@pytest.mark.ci
def test_a_run_is_interrupted_and_resumed(tmp_path, staged):
    all_ = {name: name for name in ("first", "failing", "stopped", "last")}
    status, said, page = staged(**all_)
    assert status == 130
    assert "interrupted; run the same command again to resume with the remaining stages" in said
    assert not (tmp_path / "run/stopped.json").exists()
    for row in ("first | done", "failing | failed", "stopped | to come", "first | first | 2 ms"):
        assert f"| {row} |" in page
    assert "a reason \\| in words |" in page
    status, said, page = staged(**all_)
    assert status == 0
    assert "first: already done" in said
    assert "| stopped | done |" in page
    # done once; failed twice; stopped, then done; done once
    assert (tmp_path / "log").read_text().split() == ["first", "failing", "stopped", "failing", "stopped", "last"]
    staged(first="other")  # another command is another stage
    assert (tmp_path / "log").read_text().split()[-1] == "other"
