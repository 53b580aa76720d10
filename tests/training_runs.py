"""Small training runs: their settings, how they are started, and what it means that two are equal."""

import torch

from g2gnet.data import load_dataset
from g2gnet.training import Machine, Trainer, TrainSettings, run_training
from g2gnet.training.checkpoints import RunFiles

#: what differs between the records of two equal runs
TIMES = ("seconds", "cpu_seconds", "samples_per_s")
#: the flags and defaults that users of the original programs know
DEFAULTS = {
    "dataset": "fashionmnist", "augment": "auto", "erase": 0.0, "standardize": False, "sequence": "none",
    "sequence_step": 1, "sequence_seed": 0, "bins": None, "dt": None, "unit_shift": 0, "model": "dense",
    "recurrent": False, "feedback": False,
    "delay": 0, "learn_delay": False, "input_taps": 1, "delay_lr_factor": 100.0, "delay_width": 1,
    "delay_width_schedule": "constant", "p_rec_inter": None,
    "rec_gain": 0.2, "name": None, "epochs": 20, "p_inter": 0.15, "sparsity_mode": "static", "cp": "set",
    "cg": "hebb", "T": 50, "batch_size": 256, "hidden_dim": 2048, "enc": "current", "enc_scale": 1.0, "enc_bias": 0.0,
    "neuron": "lif", "per_neuron": False, "beta": None, "threshold": None, "syn_decay": None, "adapt_decay": None,
    "a": None, "b": None, "reset": "subtract", "surrogate": "atan", "alpha": 2.0, "use_resnet": False,
    "resnet_weights": None, "chunk": None, "enforce_sparsity": False, "warmup_epochs": 10, "seed": 42,
    "block_size": 64, "num_groups": 8, "density": "uniform", "p_intra": 1.0, "lr": 1e-3, "lr_schedule": "constant",
    "lr_warmup": 0, "optimizer": "adam", "weight_decay": 1e-4, "label_smoothing": 0.0, "clip_grad_norm": None,
    "average": None, "readout": "counts", "dropout": 0.0, "init_gain": 1.0, "dst_interval": 1000, "dst_fraction": 0.1,
    "dst_schedule": "constant", "dst_stop": 1.0, "final_density": None, "precision": "fp32", "limit_train": None,
    "limit_test": None, "validation": None, "validation_seed": 0, "patience": None, "quantize": None,
    "start": None, "layers": None,
}  # fmt: skip
#: of flags that were not given, where data or other settings decide
DERIVED = {"T": None, "sequence": None}
MACHINE_FLAGS = {
    "data_dir": "data", "checkpoint_dir": "checkpoints", "peer_timeout": 30.0, "device": "auto", "backend": "auto",
    "log_dir": None, "json": None,
}  # fmt: skip
SMALL = {
    "dataset": "fashionmnist-mini", "model": "mixer", "hidden_dim": 64, "block_size": 8, "T": 8,
    "enc_scale": 3.0,  # so that the output neurons of so small a network fire
    "batch_size": 64, "limit_train": 200, "limit_test": 100, "epochs": 3,
}  # fmt: skip

#: each thing that a run has to remember is in one of them
VARIANTS = {
    "static": {},
    "rate, bf16": {"model": "dense", "enc": "rate", "enc_scale": 2.0, "precision": "bf16"},
    "permuted pixels, chunks": {
        "sequence": "permuted", "sequence_step": 98, "input_taps": 4, "chunk": 3, "model": "small_world",
        "density": "erk", "neuron": "synaptic", "syn_decay": 0.5, "per_neuron": True, "reset": "zero", "threshold": 0.8,
    },
    "regularised": {"enforce_sparsity": True, "warmup_epochs": 1, "clip_grad_norm": 0.5, "augment": "crop-flip"},
    "dynamic": {"sparsity_mode": "dynamic", "dst_interval": 2, "cp": "hebb"},
    "all schedules": {
        "dropout": 0.2, "lr_schedule": "cosine", "lr_warmup": 3, "optimizer": "adamw", "weight_decay": 0.1,
        "label_smoothing": 0.1, "average": 3, "standardize": True, "augment": "shift-flip", "erase": 0.5,
        "sparsity_mode": "dynamic", "dst_interval": 2, "dst_fraction": 0.3, "dst_schedule": "cosine", "dst_stop": 0.75,
        "cg": "gradient", "validation": 0.25, "validation_seed": 3, "patience": 3,
    },
    "images": {
        "model": "mixer", "hidden_dim": 2048, "layers": "2C3-P4-4C3-AP2-16", "num_groups": 2, "block_size": 1, "T": 3,
        "sparsity_mode": "dynamic", "dst_interval": 2, "dst_fraction": 0.3, "cg": "gradient",
        "per_neuron": True, "delay": 1, "dropout": 0.2, "chunk": 2, "enforce_sparsity": True, "warmup_epochs": 1,
    },
    "pruned from a dense start": {
        "model": "dense", "sparsity_mode": "dynamic", "dst_interval": 2, "dst_fraction": 0.0, "dst_stop": 0.75,
        "final_density": 0.2, "average": 3,
    },
    "random rules, single weights": {
        "sparsity_mode": "dynamic", "dst_interval": 2, "cp": "random", "cg": "random", "block_size": 1,
        "neuron": "adlif", "b": 0.5, "quantize": 4,
    },
}  # fmt: skip


def run(directory, **options):
    settings = TrainSettings(**{**SMALL, **options})
    run_training(settings, lambda: load_dataset(settings.dataset), directory, Machine(torch.device("cpu")))
    return RunFiles(directory, settings.stem)


def small_trainer(data=None, **options):
    settings = TrainSettings(**{**SMALL, **options})
    return Trainer(settings, data or load_dataset(settings.dataset), Machine(torch.device("cpu")))


def load(files):
    return torch.load(files.checkpoint, weights_only=True)


def assert_equal(first, second, where=""):
    """Equal to the last bit, through nested containers."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            if key not in TIMES:
                assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_equal(a, b, f"{where}/{number}")
    else:
        assert first == second, where


def flags_of(options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]
