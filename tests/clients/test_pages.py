"""The sections of docs/other-libraries.md that need these libraries."""

import os
import subprocess
import sys

import pytest
import torch
from code_blocks import BLOCK, CLIENTS, HEADING, ROOT, run_blocks

from g2gnet.data import as_samples

PAGE = ROOT / "docs" / "other-libraries.md"
SMALL = {'load_dataset("fashionmnist-mini")': 'load_dataset("fashionmnist-mini").limited(1000, 200)'}
#: what else is replaced in a section to have it run in seconds
SMALLER = {
    "Hugging Face Trainer": {"checkpoint-60": "checkpoint-10", "interval=20": "interval=5"},
    "Lightning": {"interval=20": "interval=5", "decay=0.99": "decay=0.5"},  # an average of few of so few steps
    "accelerate": {"interval=20": "interval=5"},
    "skorch and scikit-learn": {".limited(2000, 500)": "", "cv=3": "cv=2", "max_epochs=2": "max_epochs=1"},
    "Optuna": {"n_trials=10": "n_trials=2"},
}


def run(section):
    return run_blocks(PAGE, {**SMALLER.get(section, {}), **SMALL}, only=[section])


def test_every_section_is_tested():
    headings = HEADING.findall(PAGE.read_text(encoding="utf-8"))
    assert set(CLIENTS) <= set(headings)
    assert tuple(headings[-len(CLIENTS) :]) == CLIENTS, "they come last, as the page says"


def test_lightning_resumes_and_averages():
    names = run("Lightning")
    assert names["rewire"].dst.steps == 20
    assert names["rewire"].dst.grown > 0
    again = names["again"].callbacks[0].dst
    assert again.steps == 30, "the scheduler went on where the checkpoint was"
    assert again.grown > names["rewire"].dst.grown
    net = names["averaged"].net
    net.load_state_dict(net.state_dict())
    data = names["data"]
    right = net(as_samples(data.test_images)).argmax(1) == data.test_labels
    assert right.float().mean() > 0.3, "the average is a network that has learned"


def test_lightning_trains_data_parallel(tmp_path):
    """Two processes, five steps each, after the last of which they rewire: as one network by the samples of both."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Lightning\n")[1]
    code, _ = BLOCK.search(section)[1].split("\n    # resume")
    for large, small in {**SMALL, "interval=20": "interval=5", "devices=1": 'devices=2, strategy="ddp"'}.items():
        code = code.replace(large, small)
    code += """
    units = torch.cat([layer.mask.flat_unit() for layer, _ in module.net.layers()])
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    torch.save([units, weights, rewire.dst.grown], f"rank{trainer.global_rank}.pt")
"""
    (tmp_path / "program.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "program.py"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (units, weights, grown), (other_units, other_weights, _) = (torch.load(f"rank{rank}.pt") for rank in (0, 1))
    assert grown > 0
    assert torch.equal(units, other_units)
    assert torch.equal(weights, other_weights)


def test_hugging_faces_trainer_resumes():
    names = run("Hugging Face Trainer")
    dst = names["rewire"].dst
    assert dst.steps == names["trainer"].state.global_step == 20
    assert dst.grown > 0


def test_accelerate_saves_the_scheduler():
    names = run("accelerate")
    assert names["dst"].steps == 10
    assert names["dst"].grown > 0


def test_scikit_learn_searches():
    names = run("skorch and scikit-learn")
    assert names["search"].best_score_ > 0.2
    assert names["search"].best_estimator_.callbacks[0].interval == 20


def test_optuna_searches():
    assert len(run("Optuna")["study"].trials) == 2


def test_neurobench_counts_the_operations_that_we_count():
    names = run("NeuroBench")
    net, inputs, found = names["net"], names["inputs"], names["benchmark"].results
    activity = net.simulate(inputs.transpose(0, 1))
    ours = activity.synaptic_operations()
    assert found["SynapticOperations"] == {
        "Effective_ACs": sum(layer.accumulates for layer in ours) / len(inputs),
        "Effective_MACs": 0.0,
        "Dense": sum(layer.dense for layer in ours) / len(inputs),
    }
    assert found["SynapticOperations"]["Effective_ACs"] > 0
    weights = [connection.mask.num_weights for connection, _ in net.layers()]
    possible = [connection.in_features * connection.out_features for connection, _ in net.layers()]
    assert found["ConnectionSparsity"] == pytest.approx(1 - sum(weights) / sum(possible), abs=1e-4)
    spikes = torch.cat([layer.dense().flatten() for layer in activity.spikes])
    assert found["ActivationSparsity"] == pytest.approx(1 - spikes.mean().item())


def test_captum_explains():
    run("captum")


def test_onnx_computes_the_same():
    names = run("ONNX")
    x = names["x"]
    (counts,) = names["session"].run(None, {"x": x.numpy()})
    expected = names["net"](x)
    assert torch.equal(torch.from_numpy(counts), expected)
    assert expected.sum() > 0
