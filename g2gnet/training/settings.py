"""Every setting that decides a training run's results, with its default, range and meaning, in one place."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from g2g_kernels.numbers import SHARPNESS, SIZE, Number
from g2g_kernels.ops.neurons import SURROGATES
from g2gnet.data import DATASETS, own
from g2gnet.data.augmentation import SHIFTS
from g2gnet.dst_rules import GROW_RULES, PRUNE_RULES, Rule
from g2gnet.encoding import ENCODINGS
from g2gnet.features.weights import RELEASES
from g2gnet.grouping import GROUPINGS
from g2gnet.network import MODELS
from g2gnet.neurons import NEURONS, Synaptic
from g2gnet.schedules import SCHEDULES

SPARSITY_MODES = ("static", "dynamic")
PRECISIONS = ("fp32", "bf16")
#: the parameters of neurons whose initial value is a setting
PARAMETERS = ("syn_decay",)
AUGMENTATIONS = ("auto", *SHIFTS, "none")
MOST_DROPPED = 0.95
LARGEST_SEED = (1 << 63) - 1
#: of a sample; the compiled kernels number them in 16 bits
MOST_STEPS = 1 << 16


def _texts(rules: Mapping[str, Rule]) -> str:
    return ", ".join(rule.text for rule in rules.values())


class SettingsError(ValueError):
    """Settings out of range or in conflict; the message names each value, its range and a remedy."""


def setting(
    default: Any,
    group: str | None,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    file: bool = False,
) -> Any:
    """A field with its description, and for numbers the range ``low`` (excluded if ``open_low``) to ``high``.

    Whole numbers fit an int64, others a float32 (:class:`g2g_kernels.numbers.Number`).

    With ``file``, a data file (:mod:`g2gnet.data.own`) is one more choice. Users set the field by a flag in the help's
    ``group``; None: it has no flag.
    """
    number = Number(-math.inf if low is None else low, math.inf if high is None else high, open_low)
    metadata = {"group": group, "text": text, "choices": choices, "number": number, "file": file}
    return dataclasses.field(default=default, metadata=metadata)


def number_of(about: Mapping[str, Any], expected: Any) -> Number | None:
    """The kind of number that a field with metadata ``about`` and type ``expected`` holds; None: it holds none."""
    kinds = typing.get_args(expected) or (expected,)
    return about["number"]._replace(whole=int in kinds) if int in kinds or float in kinds else None


class Settings:
    """Base of frozen dataclasses with fields made by ``setting``; values out of range are refused.

    Raises:
        SettingsError: naming each invalid value.
    """

    epochs: int
    seed: int

    def __post_init__(self) -> None:
        problems = self._out_of_range() or self._at_odds()
        if problems:
            raise SettingsError("\n".join(problems))

    def _out_of_range(self) -> list[str]:
        problems = []
        types_of = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            value, about = getattr(self, field.name), field.metadata
            expected, number = _kind(types_of[field.name], value), number_of(about, types_of[field.name])
            if expected:
                problems.append(f"{field.name}={value!r:.40} is not {expected}")
            elif about["choices"]:
                if value not in about["choices"] and not (about["file"] and own.is_name(value)):
                    more = f", or a file NAME{own.SUFFIX}" if about["file"] else ""
                    known = ", ".join(about["choices"])
                    problems.append(f"{field.name}={value!r} is unknown; choose one of {known}{more}")
            elif number and value is not None and (wanted := number.refuses(value)):
                problems.append(f"{field.name}={value!r:.40} is out of range; give {wanted}")
        return problems

    def _at_odds(self) -> list[str]:
        """Conflicts between values that are each in range."""
        return []

    @property
    def stem(self) -> str:
        """The name of the run's files. It omits some settings; the files store them all."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Prefix of this run's lines when several runs are printed together."""
        return ""

    def given(self) -> dict[str, Any]:
        """The settings that users give by flags."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # the same
        return {field.name: getattr(self, field.name) for field in fields if field.metadata["group"]}

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # the same


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
    """The settings of one training run; two runs with equal settings on one machine give equal weights.

    ``resnet_weights`` stands for the content of that file: the first eight hexadecimal digits of its SHA-256
    (:func:`g2gnet.features.weights_digest`).
    """

    dataset: str = setting("fashionmnist", "data", "data set", choices=tuple(DATASETS), file=True)
    limit_train: int | None = setting(None, "data", "use only the first N training images", low=1)
    limit_test: int | None = setting(None, "data", "use only the first N test images", low=1)
    augment: str = setting(
        "auto",
        "data",
        "mirror half of the training images (flip), and shift them by up to 1 (shift-flip) or 4 pixels (crop-flip); "
        "auto: crop-flip for raw CIFAR images, none for others",
        choices=AUGMENTATIONS,
    )
    standardize: bool = setting(
        False, "data", "subtract the training images' mean from all pixels (or features), and divide by their deviation"
    )
    use_resnet: bool = setting(False, "data", "train on the features of a frozen ResNet-32 (CIFAR only)")
    resnet_weights: str | None = setting(None, "data", "weights of that ResNet-32 (default: the published ones)")

    model: str = setting("dense", "model", "fully connected, or how neurons are grouped", choices=MODELS)
    hidden_dim: int = setting(2048, "model", "neurons in each of the two hidden layers", low=1, high=SIZE.high)
    num_groups: int = setting(8, "model", "groups on each side of a sparse layer (at most one per neuron)", low=1)
    p_inter: float = setting(0.15, "model", "probability of a connection unit between groups", low=0, high=1)
    p_intra: float = setting(1.0, "model", "probability of a connection unit inside a group", low=0, high=1)
    block_size: int = setting(
        64, "model", "side of a connection unit in weights; 1 is one weight", low=1, high=SIZE.high
    )
    T: int = setting(50, "model", "time steps per sample", low=1, high=MOST_STEPS)
    enc: str = setting("current", "model", "input held as a current, or Bernoulli spikes", choices=ENCODINGS)
    enc_scale: float = setting(1.0, "model", "input x becomes enc_scale*x + enc_bias")
    enc_bias: float = setting(0.0, "model", "see enc_scale")
    neuron: str = setting("lif", "model", "neuron model", choices=tuple(NEURONS))
    syn_decay: float | None = setting(
        None,
        "model",
        f"initial decay of the synaptic current, for --neuron synaptic (default: {Synaptic.initial['syn_decay']})",
        low=0,
        high=1,
    )
    surrogate: str = setting(
        "atan",
        "model",
        "surrogate gradient of the hidden layers; the output layer keeps atan with alpha 2",
        choices=tuple(SURROGATES),
    )
    alpha: float = setting(
        2.0, "model", "sharpness of the surrogate gradient", low=0, high=SHARPNESS.high, open_low=True
    )
    init_gain: float = setting(1.0, "model", "factor on the initial weights of fc2 and fc3", low=0, open_low=True)

    epochs: int = setting(20, "training", "passes over the training images", low=1)
    batch_size: int = setting(256, "training", "images per step", low=1)
    lr: float = setting(1e-3, "training", "Adam's learning rate", low=0, open_low=True)
    lr_schedule: str = setting(
        "constant",
        "training",
        "keep the learning rate, or let it fall to zero over all steps",
        choices=tuple(SCHEDULES),
    )
    weight_decay: float = setting(1e-4, "training", "Adam's L2 penalty", low=0)
    dropout: float = setting(
        0.0,
        "training",
        "probability that a hidden neuron stays silent for a training image",
        low=0,
        high=MOST_DROPPED,
    )
    seed: int = setting(42, "training", "seed of every random draw", low=0, high=LARGEST_SEED)
    precision: str = setting("fp32", "training", "precision of the matrix products", choices=PRECISIONS)
    enforce_sparsity: bool = setting(False, "training", "pull firing rates down after the warm-up")
    warmup_epochs: int = setting(10, "training", "epochs before --enforce_sparsity begins", low=0)

    sparsity_mode: str = setting(
        "static", "dynamic sparse training", "keep or rewire the units", choices=SPARSITY_MODES
    )
    cp: str = setting(
        "set", "dynamic sparse training", f"prune rule: {_texts(PRUNE_RULES)}", choices=tuple(PRUNE_RULES)
    )
    cg: str = setting("hebb", "dynamic sparse training", f"grow rule: {_texts(GROW_RULES)}", choices=tuple(GROW_RULES))
    dst_interval: int = setting(1000, "dynamic sparse training", "optimizer steps between updates", low=1)
    dst_fraction: float = setting(
        0.1, "dynamic sparse training", "share of units replaced in an update", low=0, high=1, open_low=True
    )
    dst_schedule: str = setting(
        "constant",
        "dynamic sparse training",
        "keep that share, or let it fall to zero by the last update",
        choices=tuple(SCHEDULES),
    )
    dst_stop: float = setting(
        1.0,
        "dynamic sparse training",
        "share of training after which nothing is replaced",
        low=0,
        high=1,
        open_low=True,
    )

    def __post_init__(self) -> None:
        kind = NEURONS.get(self.neuron)
        for name in PARAMETERS:
            if getattr(self, name) is None and kind and name in kind.initial:
                object.__setattr__(self, name, kind.initial[name])  # the files store the value, as of any other setting
        super().__post_init__()

    def _at_odds(self) -> list[str]:
        problems = []
        for name in PARAMETERS:
            value, owners = getattr(self, name), [kind for kind in NEURONS if name in NEURONS[kind].initial]
            if value is not None and self.neuron not in owners:
                problems.append(
                    f"{name}={value} has no effect with neuron={self.neuron}; give --neuron {' or '.join(owners)}, or "
                    "leave it out"
                )
        if self.use_resnet and self.dataset not in RELEASES:
            problems.append(f"use_resnet needs --dataset {' or '.join(RELEASES)}, not {self.dataset}")
        if self.use_resnet and self.augment in SHIFTS:
            problems.append(
                f"augment={self.augment} needs images, but use_resnet trains on features; leave one of them out"
            )
        if self.standardize and self.enc == "rate":
            problems.append(
                "standardize makes values below 0 and above 1, which are not spike probabilities for enc=rate; "
                "give --enc current, or leave --standardize out"
            )
        if self.resnet_weights is not None and not self.use_resnet:
            problems.append("resnet_weights has no effect without use_resnet; give --use_resnet, or leave it out")
        if self.sparsity_mode == "dynamic":
            if self.model == "dense":
                problems.append(f"sparsity_mode=dynamic needs a sparse model; give --model {', '.join(GROUPINGS)}")
            elif self.p_inter == 1 and self.p_intra == 1:
                problems.append("sparsity_mode=dynamic has nothing to grow at p_inter=1 and p_intra=1; lower p_inter")
        else:
            given = {
                "cg": self.cg == "gradient",
                "dst_schedule": self.dst_schedule != "constant",
                "dst_stop": self.dst_stop != 1,
            }
            problems += [
                f"{name}={getattr(self, name)} has no effect with sparsity_mode=static; "
                "give --sparsity_mode dynamic, or leave it out"
                for name, changed in given.items()
                if changed
            ]
        return problems

    @property
    def shift(self) -> int | None:
        """By at most how many pixels training images are shifted before half are mirrored; None for neither."""
        crops = self.dataset in DATASETS and DATASETS[self.dataset].crops and not self.use_resnet
        return SHIFTS.get("crop-flip" if self.augment == "auto" and crops else self.augment)

    def neuron_parameters(self) -> dict[str, Any]:
        """The initial values of the neurons' parameters that are settings."""
        return {name: getattr(self, name) for name in PARAMETERS if getattr(self, name) is not None}

    @property
    def stem(self) -> str:
        resnet = "resnet_" if self.use_resnet else ""
        neuron = "" if self.neuron == "lif" else f"_{self.neuron}"
        for name, value in self.neuron_parameters().items():
            if value != NEURONS[self.neuron].initial[name]:
                neuron += f"_{name}{value}"
        rules = f"_cp{self.cp}_cg{self.cg}" if self.sparsity_mode == "dynamic" else ""
        return f"{resnet}{self.dataset}_{self.model}_p{self.p_inter}_T{self.T}_{self.enc}{neuron}{rules}"


def _kind(expected: Any, value: Any) -> str | None:
    """The type ``expected`` in words, if ``value`` is not of that type."""
    kinds = typing.get_args(expected) or (expected,)
    if float in kinds:
        kinds = (*kinds, int)
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return None
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kinds[0]]
