"""The settings that decide a training run's results: data, network, optimisation and rewiring."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from g2g_kernels.numbers import FLOAT32, Number
from g2gnet.base.schedules import SCHEDULES
from g2gnet.data import DATASETS, npz
from g2gnet.data.augmentation import SHIFTS, shift_problem
from g2gnet.data.binned import STEP
from g2gnet.data.features import RELEASES
from g2gnet.dst.rules import ACTIVITY, GROW_RULES, PRUNE_RULES, Rule
from g2gnet.images import Shape
from g2gnet.network_settings import Need, NetworkSettings, Others, Settings, SettingsError, of_group, with_default
from g2gnet.neurons import NEURONS
from g2gnet.notation import placed
from g2gnet.sequences import sequence_length
from g2gnet.weights.patterns import FULL, SPARSE

SPARSITY_MODES = ("static", "dynamic")
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adam", "adamw")
AUGMENTATIONS = ("auto", *SHIFTS, "none")
LARGEST_SEED = (1 << 63) - 1
#: most time steps of a sample; the compiled kernels number them in 16 bits
MOST_STEPS = 1 << 16
DYNAMIC = Need("sparsity_mode", ("dynamic",))
HELD_OUT = Need("validation", (True,))
#: the data sets of recordings
BINNED = {name: dataset.binning for name, dataset in DATASETS.items() if dataset.binning}


def _texts(rules: Mapping[str, Rule]) -> str:
    return "; ".join(name if rule.text == name else f"{name}: {rule.text}" for name, rule in rules.items())


def _each(field: str) -> str:
    """The defaults of a field of the data sets' binnings, for the help."""
    values = ((name, getattr(binning, field)) for name, binning in BINNED.items())
    return "default: " + ", ".join(f"{name} {value:g}" for name, value in values)


_data, _training, _rewiring = map(of_group, ("data", "training", "dynamic sparse training"))


@dataclasses.dataclass(frozen=True)
class RunSettings(Settings):
    """The settings of every training run: data, length of training and seed.

    Example:
        >>> RunSettings(dataset="fashionmnist-mini", epochs=3).seed
        42
    """

    NEEDS: ClassVar[Mapping[str, tuple[Need, ...]]] = dict.fromkeys(("validation_seed", "patience"), (HELD_OUT,))

    dataset: str = _data(
        "fashionmnist", "data set", choices=tuple(DATASETS), others=Others(f"a file NAME{npz.SUFFIX}", npz.is_name)
    )
    limit_train: int | None = _data(None, "use only the first N training images (and validation images)", low=1)
    limit_test: int | None = _data(None, "use only the first N test images", low=1)
    validation: float | None = _data(
        None,
        "share of each class's training images to hold out, to compare epochs; test images are used once, at the end",
        low=0, high=1, open_low=True, open_high=True,
    )  # fmt: skip
    validation_seed: int = _data(0, "seed that chooses the images of `validation`", low=0)
    epochs: int = _training(20, "passes over the training images", low=1)
    batch_size: int = _training(256, "images per step", low=1)
    seed: int = _training(42, "seed of every random draw", low=0)
    patience: int | None = _training(None, "end after N epochs without higher accuracy on held-out images", low=1)

    @property
    def stem(self) -> str:
        """The name of the run's files. It omits some settings, but the files store all."""
        raise NotImplementedError

    @property
    def given_seed(self) -> int:
        """The seed that the user gave; a fold derives its own from it."""
        return self.seed

    @property
    def seed_in_stem(self) -> str:
        """The seed as part of the files' name; empty for the default seed."""
        return "" if self.given_seed == self.defaults()["seed"] else f"_s{self.given_seed}"

    def tied_to_epochs(self) -> list[str]:
        """The settings with which every epoch depends on the number of epochs, as in an error message. Without them a
        shorter run is the beginning of a longer one."""
        return ["its schedule"]

    @property
    def label(self) -> str:
        """The prefix of this run's lines where several runs print together."""
        return ""


@dataclasses.dataclass(frozen=True)
class TrainSettings(NetworkSettings, RunSettings):
    """The settings of one training run; two runs with equal settings on one machine give equal weights.

    ``resnet_weights`` stands for the content of that file (:func:`g2gnet.data.resnet.weights_digest`). The default of
    ``T`` is 50, or the number of steps of images that unfold over time, or of recordings
    (:class:`~g2gnet.data.binned.Binning`). For your own sequences ``T`` must be given; programs look into the file.

    Example:
        >>> settings = TrainSettings(dataset="fashionmnist-mini", model="mixer", T=10)
        >>> settings.stem  # names its files
        'fashionmnist-mini_mixer_p0.15_T10_current'
    """

    NEEDS: ClassVar[Mapping[str, tuple[Need, ...]]] = {
        **NetworkSettings.NEEDS,
        **RunSettings.NEEDS,
        **dict.fromkeys(("cp", "dst_interval", "dst_fraction", "dst_stop", "final_density"), (DYNAMIC,)),
        **dict.fromkeys(("cg", "dst_schedule"), (DYNAMIC, Need("dst_fraction", (True,)))),
        "optimizer": (Need("weight_decay", (True,)),),
        "warmup_epochs": (Need("enforce_sparsity", (True,)),),
        "use_resnet": (Need("dataset", tuple(RELEASES)),),
        "resnet_weights": (Need("use_resnet", (True,)),),
        "sequence_step": (Need("sequence", ("pixels", "permuted", "rows")),),
        "sequence_seed": (Need("sequence", ("permuted",)),),
        **dict.fromkeys(("bins", "dt"), (Need("dataset", tuple(BINNED)),)),
        "unit_shift": (Need("sequence", ("own",)),),
        "delay_lr_factor": (Need("learn_delay", (True,)),),
        "delay_width_schedule": (Need("learn_delay", (True,)),),
    }
    WARNED: ClassVar[tuple[str, ...]] = (
        *NetworkSettings.WARNED, "cp", "cg", "dst_interval", "dst_fraction", "warmup_epochs",
    )  # fmt: skip

    augment: str = _data(
        "auto",
        "mirror half of the training images (flip), and shift them by up to 1 (shift-flip) or 4 pixels (crop-flip); "
        "auto: crop-flip for raw CIFAR images, none for others",
        choices=AUGMENTATIONS,
    )
    erase: float = _data(0.0, "probability of setting a rectangle of 2–33 % of a training image to zero", low=0, high=1)
    sequence: str = with_default(NetworkSettings, "sequence", None)
    sequence_step: int = _data(1, "rows or pixels per time step, for `sequence`", low=1)
    sequence_seed: int = _data(0, "seed of the pixel order of `sequence=permuted`", low=0)
    bins: int | None = _data(
        None,
        "number of bins of events: of a cochlea's channels, or of the pixels of a side; gsc: mel bands "
        f"({_each('bins')})",
        low=1,
    )
    dt: float | None = _data(None, f"milliseconds of a time step ({_each('dt')})", low=STEP.low, high=STEP.high)
    unit_shift: int = _data(0, "shift training sequences of vectors by up to N inputs, the same at all steps", low=0)
    use_resnet: bool = _data(False, "train on the features of a frozen ResNet-32 (CIFAR only)")
    resnet_weights: str | None = _data(None, "weights of that ResNet-32 (default: the published ones)")

    model: str = with_default(NetworkSettings, "model", "dense", others=None)
    T: int = with_default(
        NetworkSettings,
        "T",
        None,
        number=Number(1, MOST_STEPS),
        text=f"time steps per sample, unless `sequence` determines them (default: {NetworkSettings.T}; recordings: 34 "
        "to 140, by data set)",
    )

    name: str | None = _training(None, "added to the names of the run's files, to make them unique", metavar="NAME")

    start: str | None = _training(
        None, "train on from the network in this checkpoint of a run with the same model flags", metavar="FILE"
    )
    lr: float = _training(1e-3, "Adam's learning rate", low=0, open_low=True)
    lr_schedule: str = _training("constant", "keep the learning rate, or let it fall to zero", choices=tuple(SCHEDULES))
    lr_warmup: int = _training(0, "optimizer steps in which the learning rate rises linearly to `lr`", low=0)
    delay_lr_factor: float = _training(100.0, "learning rate of learned delays, as a multiple of `lr`", low=0)
    delay_width_schedule: str = _training(
        "constant", "keep `delay_width`, or let it fall to 1, rounded to whole steps", choices=tuple(SCHEDULES)
    )
    optimizer: str = _training("adam", "Adam, or AdamW, which decays only weights of connections", choices=OPTIMIZERS)
    weight_decay: float = _training(1e-4, "Adam's L2 penalty; AdamW's decay per step, times `lr`", low=0)
    label_smoothing: float = _training(0.0, "share of a label spread over all classes", low=0, high=1, open_high=True)
    clip_grad_norm: float | None = _training(None, "clip the gradient to this norm", low=0, open_low=True)
    average: int | None = _training(None, "test and save averaged weights: mean of N steps, then decay 1 - 1/N", low=2)
    precision: str = _training("fp32", "precision of the matrix products", choices=PRECISIONS)
    chunk: int | None = _training(None, "time steps per chunk; recomputing chunks saves memory", low=1)
    enforce_sparsity: bool = _training(False, "lower firing rates by a penalty after the warm-up")
    warmup_epochs: int = _training(10, "epochs before `enforce_sparsity` begins", low=0)

    sparsity_mode: str = _rewiring("static", "keep or rewire the units", choices=SPARSITY_MODES)
    cp: str = _rewiring("set", f"prune rule: {_texts(PRUNE_RULES)}", choices=tuple(PRUNE_RULES))
    cg: str = _rewiring("hebb", f"grow rule: {_texts(GROW_RULES)}", choices=tuple(GROW_RULES))
    dst_interval: int = _rewiring(1000, "optimizer steps between updates", low=1)
    dst_fraction: float = _rewiring(0.1, "share of units replaced in an update", low=0, high=1)
    dst_schedule: str = _rewiring("constant", "keep `dst_fraction`, or let it fall to zero", choices=tuple(SCHEDULES))
    dst_stop: float = _rewiring(1.0, "share of training after which nothing is replaced", low=0, high=1, open_low=True)
    final_density: float | None = _rewiring(
        None, "share of weights after gradual pruning", low=0, high=1, open_low=True
    )

    def __post_init__(self) -> None:
        # as values, which the files store
        if self.sequence is None:
            own = self.dataset in DATASETS and DATASETS[self.dataset].sequences
            object.__setattr__(self, "sequence", "own" if own else NetworkSettings.sequence)
        if isinstance(self.dataset, str) and (binning := BINNED.get(self.dataset)):  # from a file it may be anything
            for name, value in zip(("bins", "dt"), binning.or_usual(self.bins, self.dt), strict=True):
                object.__setattr__(self, name, value)
        if self.T is None:
            object.__setattr__(self, "T", self._steps() or NetworkSettings.T)
        super().__post_init__()

    def _steps(self) -> int | None:
        """The time steps of the data set's samples; None if they are no sequences, or of unknown length."""
        if self.sequence == "none":
            return None
        try:
            if binning := BINNED.get(self.dataset):
                return binning.steps(binning.or_usual(self.bins, self.dt)[1])
            return sequence_length(self.sequence, DATASETS[self.dataset].shape, self.sequence_step)
        except (LookupError, ValueError, TypeError, ArithmeticError):  # invalid settings, which are found later
            return None

    def _at_odds(self) -> list[str]:
        return [*super()._at_odds(), *self._of_samples(), *self._of_training()]

    def _of_samples(self) -> Iterator[str]:
        """Conflicts of settings of the data set and its samples."""
        name, binning = self.dataset, BINNED.get(self.dataset)
        if binning and self.sequence != "own":
            yield f"sequence={self.sequence} is of images, but samples of {name} are sequences; leave it out"
        elif binning:
            bins, dt = binning.or_usual(self.bins, self.dt)
            yield from binning.problems(name, bins, dt)
            if far := shift_problem(self.unit_shift, name, binning.shape(self.T, bins)[1:]):
                yield far
        elif self.sequence == "own" and name in DATASETS and not DATASETS[name].sequences:
            yield f"sequence=own is of data of your own, but {name} has images; give `sequence=rows` or another"
        of_images = self.of_images() | ({} if self.sequence == "none" else {"sequence": self.sequence})
        of_images |= {} if self.layers is None else {"layers": self.layers}
        for setting, value in of_images.items() if self.use_resnet else ():
            yield f"{setting}={value} needs images, but use_resnet trains on features; leave one of them out"

    def _of_training(self) -> Iterator[str]:
        """Conflicts of settings of training."""
        # with a point before a letter it could be the name of another run's file, such as x.previous.pth
        if self.name is not None and not re.fullmatch(r"([\w+=-]|\.(?=\d)){1,64}", self.name):
            wanted = "up to 64 letters, digits, _ + = -, and points before digits"
            yield f"name={self.name!r} is no part of a file's name; give {wanted}"
        if self.patience is not None and self.enforce_sparsity:
            yield f"patience={self.patience} could end training before enforce_sparsity acts; leave one of them out"
        if self.optimizer == "adamw" and self.lr * self.weight_decay >= 1:
            decays = f"lr={self.lr} times weight_decay={self.weight_decay}"
            yield f"{decays}, the share of a weight that a step of adamw takes, must be below 1; lower one of them"
        if self.chunk is not None and self.learn_delay:
            read = "the spikes after a chunk, which gradients of learned delays of 0 read"
            yield f"chunk={self.chunk} does not know {read}; leave `chunk` or `learn_delay` out"
        for name, rules in (("cp", PRUNE_RULES), ("cg", GROW_RULES)):
            rule, acts = getattr(self, name), name not in self.idle(vars(self))
            if acts and rules[rule].needs == ACTIVITY and self.readout != "counts":
                without = f"a correlation needs output spikes, and readout={self.readout} has none"
                yield f"{name}={rule}: {without}; give another `{name}`, or `readout=counts`"
            if acts and rules[rule].needs == ACTIVITY and re.search("[CP]", self.layers or ""):
                others = " or ".join(f"`{name}={other}`" for other in rules if rules[other].needs != ACTIVITY)
                yield f"{name}={rule}: correlations are of neurons, not of the channels of `layers`; give {others}"
        replaces = self.sparsity_mode == "dynamic" and self.final_density is None
        if replaces and self.dst_fraction < FLOAT32[0]:  # smaller numbers may be flushed to 0
            yield f"dst_fraction={self.dst_fraction} replaces nothing; raise it, or give a `final_density`"
        if replaces and self.model in SPARSE and self.p_inter == self.p_intra == 1:
            yield "sparsity_mode=dynamic has nothing to grow at p_inter=1 and p_intra=1; lower p_inter"
        if replaces and self.model in FULL:
            sparse = ", ".join(SPARSE)
            yield f"sparsity_mode=dynamic needs a sparse model; give `model={sparse}`, or a `final_density`"

    @property
    def shift(self) -> int | None:
        """The largest shift of training images, in pixels, before half are mirrored; None for neither."""
        crops = self.dataset in DATASETS and DATASETS[self.dataset].crops and not self.use_resnet
        return SHIFTS.get("crop-flip" if self.augment == "auto" and crops else self.augment)

    def of_images(self) -> dict[str, Any]:
        """The given settings that change training images."""
        changes = {"augment": self.augment in SHIFTS, "erase": self.erase > 0}
        return {name: getattr(self, name) for name, given in changes.items() if given}

    def input_shape(self, sample: Sequence[int]) -> Shape:
        """The shape of what the first layer receives at a step of samples of this shape: (C, H, W) with ``layers``, or
        (D,). Raises SettingsError if these take no images, or other ones."""
        at_once = [*sample[1:]] if self.sequence == "own" else [*sample]
        if self.layers is None:
            steps = 1 if self.sequence in ("none", "own") else self.T
            return (math.prod(at_once) // steps * self.input_taps,)
        if len(at_once) not in (2, 3):
            raise SettingsError(
                f"layers={self.layers} takes images, and a step of {self.dataset} has {at_once or 'one value'}; give "
                "`hidden_dim` in place of `layers`"
            )
        *channels, rows, columns = at_once
        shape = math.prod(channels) * self.input_taps, rows, columns
        try:
            placed(self.layer_forms(1), shape)
        except ValueError as error:
            raise SettingsError(f"layers={self.layers} of {self.dataset}: {error}; leave out a pool") from None
        return shape

    @property
    def stem(self) -> str:
        resnet = "resnet_" if self.use_resnet else ""
        neuron = "" if self.neuron == "lif" else f"_{self.neuron}"
        for name, value in self.neuron_parameters().items():
            if value != NEURONS[self.neuron].initial[name]:
                neuron += f"_{name}{value}"
        rules = f"_cp{self.cp}_cg{self.cg}" if self.sparsity_mode == "dynamic" else ""
        name = "" if self.name is None else f"_{self.name}"
        sequence = "" if self.sequence == "none" else f"_{self.sequence}"
        network = f"{self.model}_p{self.p_inter}_T{self.T}_{self.enc}{neuron}"
        return f"{resnet}{self.dataset}{sequence}_{network}{rules}{self.seed_in_stem}{name}"

    def tied_to_epochs(self) -> list[str]:
        tied = {
            f"`lr_schedule={self.lr_schedule}`": self.lr_schedule != "constant",
            f"`delay_width_schedule={self.delay_width_schedule}`": self.delay_width_schedule != "constant",
            "`enforce_sparsity`": self.enforce_sparsity,
            f"`dst_schedule={self.dst_schedule}`": self.dst_schedule != "constant",
            f"`dst_stop={self.dst_stop}`": self.dst_stop != 1,
            f"`final_density={self.final_density}`": self.final_density is not None,
        }
        return [setting for setting, depends in tied.items() if depends]
