"""The programs in ``examples`` that need these libraries."""

import os
import subprocess
import sys

import torch
from code_blocks import ROOT

from g2gnet.data import as_samples

SMALL = {'load_dataset("fashionmnist-mini")': 'load_dataset("fashionmnist-mini").limited(1000, 200)'}
#: what else is replaced in a program to have it run in seconds
SMALLER = {
    "hugging_face_training": {"checkpoint-60": "checkpoint-10", "interval=20": "interval=5"},
    "lightning_training": {"interval=20": "interval=5", "decay=0.99": "decay=0.5"},  # an average of few of so few steps
    "accelerate_training": {"interval=20": "interval=5"},
    "scikit_learn_search": {".limited(2000, 500)": "", "cv=3": "cv=2", "max_epochs=2": "max_epochs=1"},
    "optuna_search": {"n_trials=10": "n_trials=2"},
}


def code_of(name, smaller):
    code = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    for large, small in {**smaller, **SMALL}.items():
        code = code.replace(large, small)
    return code


def run(name):
    names = {"__name__": "__main__"}
    exec(compile(code_of(name, SMALLER.get(name, {})), f"{name}.py", "exec"), names)
    return names


def test_lightning_resumes_and_averages():
    names = run("lightning_training")
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
    smaller = {"interval=20": "interval=5", "devices=1": 'devices=2, strategy="ddp"'}
    code, _ = code_of("lightning_training", smaller).split("\n    # resume")
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


def test_hugging_faces_trainer_resumes_and_accelerate_saves_the_scheduler():
    names = run("hugging_face_training")
    assert names["trainer"].state.global_step == 20
    for dst, steps in ((names["rewire"].dst, 20), (run("accelerate_training")["dst"], 10)):
        assert dst.steps == steps
        assert dst.grown > 0


def test_scikit_learn_and_optuna_search():
    search = run("scikit_learn_search")["search"]
    assert search.best_score_ > 0.2
    assert search.best_estimator_.callbacks[0].interval == 20
    assert len(run("optuna_search")["study"].trials) == 2


def test_neurobench_counts_the_operations_that_we_count():
    names = run("neurobench_counts")
    net, inputs, found = names["net"], names["inputs"], names["benchmark"].results
    ours = net.simulate(inputs.transpose(0, 1)).synaptic_operations()
    assert found["SynapticOperations"] == {
        "Effective_ACs": sum(layer.accumulates for layer in ours) / len(inputs),
        "Effective_MACs": 0.0,
        "Dense": sum(layer.dense for layer in ours) / len(inputs),
    }
    assert found["SynapticOperations"]["Effective_ACs"] > 0


def test_onnx_computes_the_same_and_captum_explains(capsys):
    names = run("onnx_inference")
    (counts,) = names["session"].run(None, {"x": names["x"].numpy()})
    expected = names["net"](names["x"])
    assert torch.equal(torch.from_numpy(counts), expected)
    assert expected.sum() > 0
    capsys.readouterr()
    run("captum_attribution")
    assert capsys.readouterr().out == "torch.Size([8, 10, 256])\n"
