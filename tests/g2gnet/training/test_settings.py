"""Settings: defaults, names of files, ranges, and combinations that cannot work."""

import math

import pytest
from training_runs import DEFAULTS

from g2gnet import LIF, Synaptic
from g2gnet.network_settings import types_of
from g2gnet.training import SettingsError, TrainSettings
from g2gnet.training.cross_validation import FoldSettings


def test_the_defaults():
    assert TrainSettings().as_dict() == {**DEFAULTS, **LIF.initial}
    assert (type(TrainSettings().T), type(TrainSettings().sequence)) == (int, str)
    for model in ("dense", "index"):  # there may be more groups than neurons
        assert TrainSettings(model=model, num_groups=64, hidden_dim=8).hidden_dim == 8
    of_module = Synaptic.initial["syn_decay"]
    assert TrainSettings(neuron="synaptic") == TrainSettings(neuron="synaptic", syn_decay=of_module)


RESNET = {"dataset": "cifar10", "use_resnet": True}
MANY = 10**26
OWN = {"sequence": "own", "dataset": "mine-0123abcd"}
IMAGES = {"model": "conv", "layers": "8C3-P2"}
DYNAMIC = {"model": "index", "sparsity_mode": "dynamic"}


@pytest.mark.parametrize(
    ("options", "stem"),
    [
        ({}, "fashionmnist_dense_p0.15_T50_current"),
        ({"model": "mixer", "p_inter": 0.3, "T": 10, "enc": "rate"}, "fashionmnist_mixer_p0.3_T10_rate"),
        ({"neuron": "synaptic", "syn_decay": 0.8}, "fashionmnist_dense_p0.15_T50_current_synaptic"),
        (DYNAMIC | {"neuron": "synaptic", "syn_decay": 0.5, "cg": "random"},
         "fashionmnist_index_p0.15_T50_current_synaptic_syn_decay0.5_cpset_cgrandom"),
        ({"neuron": "adlif", "a": 0.1, "b": 0.1}, "fashionmnist_dense_p0.15_T50_current_adlif_a0.1"),
        ({"surrogate": "triangle", "alpha": 4.0, "cp": "hebb"}, "fashionmnist_dense_p0.15_T50_current"),
        (RESNET, "resnet_cifar10_dense_p0.15_T50_current"),
        ({"sequence": "rows"}, "fashionmnist_rows_dense_p0.15_T28_current"),
        ({"sequence": "permuted", "sequence_step": 4}, "fashionmnist_permuted_dense_p0.15_T196_current"),
        ({"dataset": "ssc", "dt": 4.0}, "ssc_own_dense_p0.15_T250_current"),
        ({"dataset": "dvsgesture", "T": 9}, "dvsgesture_own_dense_p0.15_T9_current"),
        ({"sequence": "pixels", "dataset": "cifar100", "T": 1024}, "cifar100_pixels_dense_p0.15_T1024_current"),
        (OWN | {"T": 9, "enc": "rate"}, "mine-0123abcd_own_dense_p0.15_T9_rate"),
    ],
)  # fmt: skip
def test_the_stem_names_the_run(options, stem):
    assert TrainSettings(**options).stem == stem


#: numbers by the range in which they lie
RANGES = {
    "[0, 1]": ("p_inter", "p_intra", "erase", "dst_fraction"),
    "(0, 1]": ("dst_stop", "final_density"),
    "[0, 1)": ("label_smoothing", "dropout"),
    "(0, 1)": ("validation",),
    "(0, inf)": ("lr", "alpha", "clip_grad_norm", "init_gain"),
    "[0, inf)": ("weight_decay", "seed", "validation_seed", "lr_warmup", "warmup_epochs", "delay"),
    "[1, inf)": ("T", "batch_size", "epochs", "hidden_dim", "block_size", "num_groups", "dst_interval", "patience",
                 "limit_train", "limit_test", "chunk", "sequence_step", "bins"),
    "[2, inf)": ("average",),
}  # fmt: skip


@pytest.mark.parametrize(("interval", "name"), [(interval, name) for interval in RANGES for name in RANGES[interval]])
def test_a_number_outside_of_its_range_is_named(interval, name):
    low, high = map(float, interval[1:-1].split(", "))
    kind = int if int in types_of(TrainSettings)[name] else float

    def refusal(value):
        try:
            TrainSettings(**{name: kind(value)})
        except SettingsError as error:
            return f"{name}={kind(value)!r} must be" in str(error)

    assert refusal(low if interval[0] == "(" else low - (1 if kind is int else 0.01))
    assert not refusal(low + 0.01 if interval[0] == "(" else low)
    if high < math.inf:
        assert refusal(high if interval[-1] == ")" else high + 0.01)
        assert not refusal(high - 0.01 if interval[-1] == ")" else high)
    assert kind is int or refusal(math.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enc_scale": float("nan")}, "enc_scale=nan must be a finite number"),
        ({"enc_scale": 1e300}, "enc_scale=.* must be a finite number that a float32 holds"),
        ({"alpha": 1e-310}, "alpha=1e-310 must be a number above 0 .* that a float32 holds"),
        ({"lr": 1e308}, r"lr=1e\+308 must be"),
        ({"model": "index", "num_groups": MANY}, "num_groups=1"),
        ({"hidden_dim": 10**12}, "hidden_dim=1000000000000 must be .* to 2147483647"),
        ({"dataset": "mnist"}, "dataset='mnist' is unknown; choose one of fashionmnist, "),
        ({"p_inter": 2.0, "T": 0, "model": "ring"}, r"=.*\n.*=.*\n.*="),  # all at once
        ({"neuron": "izhikevich"}, "neuron='izhikevich' is unknown; choose one of lif, synaptic, adlif"),
        ({"syn_decay": 0.8}, "syn_decay=0.8 has no effect with neuron=lif; give `neuron=synaptic` or `neuron=cubalif`"),
        ({"neuron": "synaptic", "syn_decay": 1.5}, "syn_decay=1.5 must be a number from 0 to"),
        (RESNET | {"augment": "flip"}, "augment=flip needs images"),
        (RESNET | {"sequence": "rows"}, "sequence=rows needs images, but use_resnet trains on features; leave one of"),
        ({"use_resnet": True}, "use_resnet=True has no effect with dataset=fashionmnist; give `dataset=cifar10` or"),
        ({"dataset": "cifar10", "resnet_weights": "w.pt"}, "resnet_weights=w.pt has no effect without use_resnet"),
        ({"standardize": True, "enc": "rate"}, "standardize makes .* not spike probabilities .* give `enc=current`"),
        ({"optimizer": "adamw", "weight_decay": 1000.0}, "adamw takes, must be below 1; lower one of them"),
        ({"optimizer": "adamw", "weight_decay": 0.0}, "adamw has no effect with weight_decay=0.0; give `weight_decay`"),
        ({"quantize": 3}, "quantize=3 is not one of 8, 4; give one, or leave it out"),
        ({"patience": 3}, "patience=3 has no effect without validation; give `validation`, or leave it out"),
        ({"validation": 0.1, "patience": 2, "enforce_sparsity": True}, "patience=2 could end training before enforce"),
        ({"sequence": "own"}, "sequence=own is of data of your own, but fashionmnist has images; give `sequence=rows`"),
        ({"sequence_step": 4}, "sequence_step=4 has no effect with sequence=none; give `sequence=pixels`"),
        ({"sequence": "pixels", "sequence_seed": 1}, "sequence_seed=1 has no effect with sequence=pixels; give `seq"),
        ({"input_taps": 4}, "input_taps=4 has no effect with sequence=none; give `sequence=rows`"),
        ({"sequence": "rows", "input_taps": 29}, "input_taps=29 is more than the T=28 steps of a sequence; lower it"),
        ({"bins": 140}, "bins=140 has no effect with dataset=fashionmnist; give `dataset=shd`, .* or `dataset=dvsges"),
        ({"dataset": "shd", "bins": 128}, "bins=128 does not divide the 700 channels of shd; give one of 1, 2, 4"),
        ({"dataset": "shd", "dt": 0.0}, "dt=0.0 must be a number from 0.1 to 60000"),
        ({"dataset": "nmnist", "sequence": "rows"}, "sequence=rows is of images, but samples of nmnist are sequences"),
        ({"dataset": "shd", "sequence": "none"}, "sequence=none is of images, but samples of shd are sequences; leave"),
        ({"dataset": "nmnist", "unit_shift": 3}, r"unit_shift=3 needs .*, but a step of nmnist is of shape \[2, 34, 3"),
        ({"dataset": "shd", "bins": 7, "unit_shift": 7}, r"a step of shd is of shape \[7\]; lower it, or leave it out"),
        ({"unit_shift": 3}, "unit_shift=3 has no effect with sequence=none; give `sequence=own`"),
        ({"sparsity_mode": "dynamic"}, "sparsity_mode=dynamic needs a sparse model; give `model=index"),
        ({"model": "conv"}, "model=conv needs `layers`; give 32C3 .32 channels, .* joined as 32C3-64C3-P2-128C3-P2"),
        (IMAGES | {"layers": "8C3-P2-X"}, "^'X' in layers=8C3-P2-X is no layer; give 32C3 .* as 32C3-64C3-P2-128C3-P2"),
        (IMAGES | {"layers": "8C4"}, "8C4 in layers=8C4 has an even kernel, .* the size; give an odd one"),
        (IMAGES | {"layers": "8C3-0C3"}, "layers=8C3-0C3: a number in 0C3=0 must be a whole number from 1"),
        (IMAGES | {"layers": "32-8C3"}, "8C3 in layers=32-8C3 needs images, but stands behind 32 neurons"),
        (IMAGES | {"layers": "P2-AP2"}, "layers=P2-AP2 has pools alone; give 32C3"),
        (IMAGES | {"model": "dense"}, "layers=8C3-P2 needs a model of channels; give `model=conv`, or a sparse model"),
        (IMAGES | {"hidden_dim": 64}, "hidden_dim=64 is of networks without images, not of layers=8C3-P2; leave one"),
        (IMAGES | {"recurrent": True, "quantize": 8}, r"^recurrent=True is of .*\nquantize=8 is of networks without"),
        (IMAGES | {"sequence": "rows"}, "sequence=rows gives no images, which layers=8C3-P2 takes; leave one of them"),
        (RESNET | IMAGES, "layers=8C3-P2 needs images, but use_resnet trains on features; leave one of them out"),
        (DYNAMIC | {"layers": "8C3-P2"}, "cg=hebb: correlations are of neurons, .* give `cg=random` or `cg=gradient`"),
        ({"dst_schedule": "cosine", "model": "index"}, "dst_schedule=cosine has no effect with sparsity_mode=static"),
        (DYNAMIC | {"dst_fraction": 1e-310}, "dst_fraction=1e-310 replaces nothing"),
        (DYNAMIC | {"p_inter": 1.0}, "nothing to grow at p_inter=1"),
        (DYNAMIC | {"dst_fraction": 0.0, "dst_schedule": "cosine"}, "cosine has no effect with dst_fraction=0.0; give"),
    ],
)
def test_bad_values_are_named_with_range_and_remedy(options, message):
    with pytest.raises(SettingsError, match=message):
        TrainSettings(**options)


def test_folds_hold_images_out_themselves():
    for name, value in {"validation": 0.1, "patience": 2, "validation_seed": 1, "start": "a.pth"}.items():
        message = f"^{name}={value} is of single runs: each fold is held out in turn.*leave `{name}` out$"
        with pytest.raises(SettingsError, match=message):
            FoldSettings(**{name: value})


def test_what_changes_nothing_is_named():
    for options, told in (
        ({}, []),
        ({"cp": "random", "dst_fraction": 0.2}, ["`cp=random` ", "`dst_fraction=0.2` "]),
        ({"model": "index", "cg": "random"}, ["`cg=random` has no effect with `sparsity_mode=static`"]),
        (DYNAMIC | {"final_density": 0.1, "dst_fraction": 0.0, "cg": "gradient"}, ["`cg=gradient` has no effect with"]),
        (DYNAMIC | {"cp": "random", "p_inter": 0.2}, []),
        ({"num_groups": 4, "p_intra": 0.5}, ["`num_groups=4` has no effect with `model=dense`", "`p_intra=0.5` "]),
        ({"warmup_epochs": 3}, ["`warmup_epochs=3` has no effect without `enforce_sparsity`"]),
        ({"warmup_epochs": 3, "enforce_sparsity": True}, []),
    ):
        found = TrainSettings(**options).without_effect()
        assert len(found) == len(told)
        assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


def test_raw_cifar_images_are_augmented_unless_told_otherwise():
    for options, shift in (
        ({}, None),
        ({"augment": "crop-flip"}, 4),
        ({"augment": "shift-flip"}, 1),
        ({"dataset": "cifar10", "augment": "flip"}, 0),
        ({"dataset": "cifar10"}, 4),
        ({"dataset": "cifar100"}, 4),
        ({"dataset": "cifar100", "augment": "none"}, None),
        (RESNET, None),
    ):
        assert TrainSettings(**options).shift == shift, options
