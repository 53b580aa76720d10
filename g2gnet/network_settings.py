"""Settings: frozen records whose fields carry default, range and meaning, for constructors, flags, help texts, checks
and checkpoints; and the settings of a network."""

import dataclasses
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from g2g_kernels.choices import check_choice, check_flag
from g2g_kernels.numbers import SHARPNESS, SIZE, Number
from g2g_kernels.ops.neurons import RESETS, SURROGATES
from g2g_kernels.ops.neurons.models import RESET
from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE
from g2gnet.encoding import ENCODINGS
from g2gnet.neurons import NEURONS
from g2gnet.notation import FORM, Layer, parse
from g2gnet.sequences import SEQUENCES
from g2gnet.spiking_network import DROPOUT, READOUTS
from g2gnet.weights.densities import DENSITIES
from g2gnet.weights.few_bits import BITS
from g2gnet.weights.patterns import MODELS, SPARSE, Pattern

#: factor on the initial recurrent weights: with it networks learn rows of Fashion-MNIST fastest at first, and no other
#: factor is better at the end (docs/over-time.md)
REC_GAIN = 0.2


class SettingsError(ValueError):
    """Settings out of range or in conflict; the message names each value, its range and a remedy."""


class Need(NamedTuple):
    """A condition under which a setting has an effect: the setting ``name`` has one of some values."""

    name: str
    values: tuple[Any, ...]

    def is_met(self, settings: Mapping[str, Any]) -> bool:
        """Whether these settings fulfil the condition."""
        value = settings.get(self.name)  # from a file it may be anything
        if True in self.values and isinstance(value, int | float | tuple | list):
            value = bool(value)
        return isinstance(value, str | bool) and value in self.values

    def unmet(self, settings: Mapping[str, Any], quote: str = "") -> str:
        """Why a setting has no effect with these settings."""
        value = getattr(settings[self.name], "__name__", settings[self.name])  # a pattern may be a function
        given = value is not None and value is not False
        return f"with {quote}{self.name}={value}{quote}" if given else f"without {quote}{self.name}{quote}"

    def remedy(self) -> str:
        """What to give so that the setting has an effect."""
        if self.values == (True,):
            return f"give `{self.name}`"
        *others, last = (f"`{self.name}={value}`" for value in self.values)
        return f"give {', '.join(others)} or {last}" if others else f"give {last}"


class Others(NamedTuple):
    """More choices than can be listed: ``text`` names them, and ``accepts(value)`` recognises them."""

    text: str
    accepts: Callable[[object], bool]


def setting(
    default: Any,
    group: str | None,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    others: Others | None = None,
    metavar: str | None = None,
    several: bool = False,
    **interval: Any,
) -> Any:
    """A field with its description. ``interval`` is that of a number (``low``, ``high``, ``open_low``, ``open_high`` of
    :class:`g2g_kernels.numbers.Number`).

    Programs make a flag of each field, in the help's ``group``, with ``metavar`` for its value; None: it has no flag.
    With ``several`` the value may also be a tuple of whole numbers in the interval, or a list, as files have it."""
    metadata = {
        "group": group, "text": text, "choices": choices, "others": others, "number": Number(**interval),
        "metavar": metavar, "several": several,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def of_group(group: str) -> Callable[..., Any]:
    """A function that makes fields of that group from their default, text and options, as :func:`setting`."""
    return lambda default, text, **options: setting(default, group, text, **options)


def with_default(settings: type, name: str, default: Any, **changes: Any) -> Any:
    """The field ``name`` of ``settings`` with another default, and with ``changes`` of its description."""
    (field,) = [field for field in dataclasses.fields(settings) if field.name == name]
    return dataclasses.field(default=default, metadata={**field.metadata, **changes})


def types_of(settings: type) -> dict[str, tuple[Any, ...]]:
    """The types that the value of each field may have; ``int | None`` are int and that of None."""
    return {name: typing.get_args(kind) or (kind,) for name, kind in typing.get_type_hints(settings).items()}


def number_of(about: Mapping[str, Any], kinds: Collection[Any]) -> Number | None:
    """The kind of number that a field with metadata ``about`` and these types holds, or None."""
    return about["number"]._replace(whole=int in kinds) if int in kinds or float in kinds else None


SettingsT = TypeVar("SettingsT", bound="Settings")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses with fields made by ``setting``. Raises SettingsError, naming each invalid value.

    Example:
        >>> from g2gnet.training import NetworkSettings
        >>> isinstance(NetworkSettings(), Settings)
        True
    """

    #: per setting, the conditions under which it has an effect, most informative first
    NEEDS: ClassVar[Mapping[str, tuple[Need, ...]]] = {}
    #: settings that programs warn of where they have no effect; others are refused, unless they have their default
    WARNED: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        problems = self._out_of_range() or self._at_odds()
        if problems:
            raise SettingsError("\n".join(problems))

    def _out_of_range(self) -> list[str]:
        """What is wrong with single values; whole numbers of NumPy and PyTorch become ints."""
        problems = []
        kinds_of = types_of(type(self))
        for field in dataclasses.fields(self):
            name, value, about, kinds = field.name, getattr(self, field.name), field.metadata, kinds_of[field.name]
            others: Others | None = about["others"]
            try:
                if (value is None and type(None) in kinds) or (others and others.accepts(value)):
                    continue
                if about["several"] and isinstance(value, tuple | list | range):
                    if not value:
                        raise ValueError(f"{name}={value!r} is empty; give at least one number, or leave it out")
                    whole = about["number"]._replace(whole=True)
                    object.__setattr__(self, name, tuple([whole.check(name, each) for each in value]))
                elif number := number_of(about, kinds):
                    object.__setattr__(self, name, number.check(name, value))
                elif bool in kinds:
                    check_flag(name, value)
                elif about["choices"]:
                    check_choice(name, value, about["choices"], others.text if others else "")
                elif not isinstance(value, str):
                    raise ValueError(f"{name}={value!r:.40} must be text")
            except ValueError as error:
                problems.append(str(error))
        return problems

    def _at_odds(self) -> list[str]:
        """Conflicts between values that are each in range."""
        return [
            f"{name}={getattr(self, name)} has no effect {need.unmet(vars(self))}; {need.remedy()}, or leave it out"
            for name, need in self._without_effect().items()
            if name not in self.WARNED
        ]

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> dict[str, Need]:
        """The settings that have no effect among these values, each with the condition that it lacks."""
        lacks = {name: [need for need in needs if not need.is_met(values)] for name, needs in cls.NEEDS.items()}
        return {name: needs[0] for name, needs in lacks.items() if needs}

    def _without_effect(self) -> dict[str, Need]:
        """The idle settings that differ from their default."""
        values, usual = vars(self), self.defaults()
        return {name: need for name, need in self.idle(values).items() if values[name] != usual[name]}

    def without_effect(self) -> list[str]:
        """Each setting that differs from its default and has no effect, with the reason."""
        return [
            f"`{name}={getattr(self, name)}` has no effect {need.unmet(vars(self), '`')}"
            for name, need in self._without_effect().items()
        ]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {field.name: field.default for field in dataclasses.fields(cls)}

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def flag_values(self) -> dict[str, Any]:
        """The settings that users give by flags."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.metadata["group"]}

    @classmethod
    def from_saved(cls: type[SettingsT], saved: Mapping[str, Any]) -> SettingsT:
        """The settings that ``as_dict`` gave, perhaps in an earlier version. Later settings have their default; so have
        those that are now refused since they have no effect. Raises SettingsError for other people's settings."""
        idle = cls.idle({**cls.defaults(), **saved}).keys() - set(cls.WARNED)
        return cls(**{name: value for name, value in saved.items() if name not in idle})

    @classmethod
    def complete(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """``saved``, as for :meth:`from_saved`, with the default of each later setting; names unknown here stay."""
        names = cls.defaults().keys()
        try:
            known = cls.from_saved({name: value for name, value in saved.items() if name in names})
        except SettingsError:  # other people's settings
            return dict(saved)
        return {**known.as_dict(), **saved}


#: the parameters of neurons whose initial values are settings, and the models that have each
PARAMETERS = ("syn_decay", "adapt_decay", "beta", "a", "b", "threshold")
_OWNERS = {name: [model for model, kind in NEURONS.items() if name in kind.initial] for name in PARAMETERS}


def _initial(parameter: str, text: str) -> str:
    """The help text of a parameter's initial value, with the models that have it and its default."""
    models = _OWNERS[parameter]
    default = " or ".join(dict.fromkeys(str(NEURONS[name].initial[parameter]) for name in models))
    only = "" if len(models) == len(NEURONS) else f", for `neuron={' or '.join(models)}`"
    return f"initial {text}{only} (default: {default})"


_model = of_group("model")
SPARSE_MODEL = Need("model", tuple(SPARSE))
RECURRENT = Need("recurrent", (True,))
#: steps of a delay, which the CPU kernels number in 16 bits
MOST_DELAY = (1 << 16) - 1


@dataclasses.dataclass(frozen=True)
class NetworkSettings(Settings):
    """What decides a :class:`~g2gnet.G2GNet` besides the sizes of its data, its backend and its random draws.
    ``G2GNet.from_settings`` makes the network; the constructor's arguments have these names and defaults.

    Example:
        >>> from g2gnet import G2GNet
        >>> settings = NetworkSettings(model="mixer", hidden_dim=64, block_size=8, T=5)
        >>> G2GNet.from_settings(settings, input_dim=64, num_classes=10).T
        5
    """

    NEEDS: ClassVar[Mapping[str, tuple[Need, ...]]] = {
        **{name: (Need("neuron", tuple(models)),) for name, models in _OWNERS.items()},
        **dict.fromkeys(("num_groups", "p_inter", "p_intra", "density"), (SPARSE_MODEL,)),
        "p_rec_inter": (RECURRENT, SPARSE_MODEL, Need("density", ("uniform",))),
        "rec_gain": (RECURRENT,),
        "learn_delay": (Need("delay", (True,)),),
        "delay_width": (Need("learn_delay", (True,)),),
        "input_taps": (Need("sequence", tuple(name for name in SEQUENCES if name != "none")),),
    }
    WARNED: ClassVar[tuple[str, ...]] = ("num_groups", "p_inter", "p_intra")

    model: str | Pattern = _model(  # noqa: RUF009  (a function is as immutable as text)
        "index",
        "fully connected (conv: the `layers`, with every kernel), or how groups of neurons or channels are connected",
        choices=MODELS,
        others=Others("a pattern of your own", callable),
    )
    hidden_dim: int | tuple[int, ...] = _model(
        2048,
        "neurons in each of the two hidden layers, or a list with one number per layer",
        low=1,
        high=SIZE.high,
        several=True,
    )
    layers: str | None = _model(
        None,
        "hidden layers of images in place of `hidden_dim`, as 32C3-64C3-P2-128C3-P2: 32C3 is a convolution with 32 "
        "channels and 3 × 3 kernels that keeps the size, P2 or AP2 a pool of 2 × 2 spikes (maximum or mean), 256 "
        "neurons without a place",
        metavar="LAYERS",
    )
    num_groups: int = _model(8, "groups on each side of a sparse layer (at most one per neuron)", low=1)
    p_inter: float = _model(0.15, "probability of a connection unit between groups", low=0, high=1)
    p_intra: float = _model(1.0, "probability of a connection unit inside a group", low=0, high=1)
    density: str = _model(
        "uniform", "share of existing weights: the same in each layer, or more in small layers (erk)", choices=DENSITIES
    )
    block_size: int = _model(
        64, "connection units are blocks of N × N weights; 1: single weights", low=1, high=SIZE.high
    )
    sequence: str = setting(
        "none",
        "data",
        f"input of a time step; {'; '.join(f'{name}: {text}' for name, text in SEQUENCES.items())} "
        "(the default for files of sequences)",
        choices=tuple(SEQUENCES),
    )
    T: int = _model(50, "time steps per sample", low=1)
    enc: str = _model("current", "input held as a current, or Bernoulli spikes", choices=ENCODINGS)
    enc_scale: float = _model(1.0, "input x becomes enc_scale*x + enc_bias")
    enc_bias: float = _model(0.0, "see `enc_scale`")
    standardize: bool = setting(
        False, "data", "normalise all pixels (or features) by the training images' mean and standard deviation"
    )
    neuron: str = _model("lif", "neuron model", choices=tuple(NEURONS))
    recurrent: bool | tuple[int, ...] = _model(
        False,
        "recurrent connections in each hidden layer, or a list of layers, from 1; spikes arrive one step later",
        low=1,
        several=True,
    )
    feedback: bool = _model(
        False, "connections from each hidden layer back to the one below; spikes arrive one step later"
    )
    delay: int = _model(
        0, "spikes and inputs arrive up to N steps later; a delay is drawn for each neuron", low=0, high=MOST_DELAY
    )
    learn_delay: bool = _model(False, "learn these delays, each from 0 to `delay`")
    delay_width: int = _model(
        1, "steps on either side of a spike that gradients of learned delays see", low=1, high=MOST_DELAY
    )
    input_taps: int = _model(
        1, "delayed copies of the inputs, spread evenly over the sequence, each with its own weights", low=1
    )
    p_rec_inter: float | None = _model(
        None, "probability of a recurrent unit between groups, for `recurrent` (default: p_inter)", low=0, high=1
    )
    rec_gain: float = _model(REC_GAIN, "factor on the initial recurrent weights, for `recurrent`", low=0, open_low=True)
    per_neuron: bool = _model(False, "one value of each parameter per neuron instead of one per layer")
    beta: float | None = _model(None, _initial("beta", "decay of the membrane"), low=0, high=1)
    threshold: float | None = _model(None, _initial("threshold", "firing threshold"), low=0, open_low=True)
    syn_decay: float | None = _model(None, _initial("syn_decay", "decay of the synaptic current"), low=0, high=1)
    adapt_decay: float | None = _model(None, _initial("adapt_decay", "decay of the adaptation"), low=0, high=1)
    a: float | None = _model(None, _initial("a", "share of the membrane added to the adaptation"))
    b: float | None = _model(None, _initial("b", "increase of the adaptation by a spike"))
    reset: str = _model(
        RESET, "after a spike: subtract the threshold, set the membrane to zero, or nothing", choices=RESETS
    )
    surrogate: str = _model(
        SURROGATE,
        f"surrogate gradient of the hidden layers; the output layer keeps {SURROGATE} with alpha {ALPHA:g}",
        choices=tuple(SURROGATES),
    )
    alpha: float = _model(ALPHA, "sharpness of the surrogate gradient", low=0, high=SHARPNESS.high, open_low=True)
    readout: str = _model(
        "counts",
        "logits: spike counts, or the last, mean or largest membrane of output neurons that do not spike",
        choices=READOUTS,
    )
    dropout: float = _model(
        0.0, "probability that a hidden neuron stays silent for a training image", low=0, high=DROPOUT.high
    )
    quantize: int | None = _model(
        None, "compute with weights of this many bits, 8 or 4, rounded from floats that are trained (docs/c.md)"
    )
    init_gain: float = _model(1.0, "factor on the initial weights of fc2 and fc3", low=0, open_low=True)

    def __post_init__(self) -> None:
        kind = NEURONS.get(self.neuron)
        for name in PARAMETERS:
            if getattr(self, name) is None and kind and name in kind.initial:
                object.__setattr__(self, name, kind.initial[name])  # the files store the value, as of any other setting
        super().__post_init__()

    def layer_forms(self, num_classes: int) -> tuple[Layer, ...]:
        """The layers of a network with so many outputs."""
        if self.layers is not None:
            return parse(self.layers, num_classes)
        return tuple([Layer(size) for size in (*self.hidden_sizes, num_classes)])

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """The neurons of each hidden layer."""
        return self.hidden_dim if isinstance(self.hidden_dim, tuple) else (self.hidden_dim,) * 2

    def is_recurrent(self, layer: int) -> bool:
        """Whether hidden layer ``layer`` (from 1) has recurrent connections."""
        return self.recurrent if isinstance(self.recurrent, bool) else layer in self.recurrent

    def _at_odds(self) -> list[str]:
        problems = [*super()._at_odds(), *(self._of_sizes() if self.layers is None else self._of_layers(self.layers))]
        if self.quantize not in (None, *BITS):
            problems.append(
                f"quantize={self.quantize} is not one of {', '.join(map(str, BITS))}; give one, or leave it out"
            )
        if self.input_taps > self.T:
            problems.append(f"input_taps={self.input_taps} is more than the T={self.T} steps of a sequence; lower it")
        if self.standardize and self.enc == "rate":
            problems.append(
                "standardize makes values below 0 and above 1, which are not spike probabilities for enc=rate; "
                "give `enc=current`, or leave `standardize` out"
            )
        return problems

    def _of_sizes(self) -> Iterator[str]:
        """Conflicts of settings of the layers of ``hidden_dim``."""
        count = len(self.hidden_sizes)
        if self.model == "conv":
            yield f"model=conv needs `layers`; give {FORM}"
        if not isinstance(self.recurrent, bool) and max(self.recurrent) > count:
            yield f"recurrent={self.recurrent}: there are {count} hidden layers, numbered from 1"
        if not isinstance(self.recurrent, bool) and len(set(self.recurrent)) < len(self.recurrent):
            yield f"recurrent={self.recurrent} names a layer twice; give each once"
        if self.feedback and count < 2:
            yield "feedback joins a hidden layer to the one below it, and there is one; leave `feedback` out"

    def _of_layers(self, layers: str) -> Iterator[str]:
        """Conflicts of settings with ``layers``."""
        try:
            parse(layers)
        except ValueError as error:
            yield str(error)
        if self.model == "dense":
            yield f"layers={layers} needs a model of channels; give `model=conv`, or a sparse model"
        for name in ("hidden_dim", "recurrent", "feedback", "quantize"):
            if (value := getattr(self, name)) != self.defaults()[name]:
                yield f"{name}={value} is of networks without images, not of layers={layers}; leave one of them out"
        if self.sequence in ("rows", "pixels", "permuted"):
            yield f"sequence={self.sequence} gives no images, which layers={layers} takes; leave one of them out"

    def neuron_parameters(self) -> dict[str, float]:
        """The initial values of the neurons' parameters."""
        return {name: getattr(self, name) for name in PARAMETERS if getattr(self, name) is not None}

    def network_options(self) -> dict[str, Any]:
        """The network's settings alone, as arguments of ``G2GNet``."""
        names = [field.name for field in dataclasses.fields(NetworkSettings) if field.name not in PARAMETERS]
        return {**{name: getattr(self, name) for name in names}, **self.neuron_parameters()}
