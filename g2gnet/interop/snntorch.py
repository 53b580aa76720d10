"""Networks of ``nn.Linear`` and snnTorch's ``Leaky``, ``Synaptic``, ``RLeaky``, ``RSynaptic`` as g2g stacks, and back;
those with ``nn.Conv2d``, pools and ``nn.BatchNorm2d`` as stacks only.

Weights, masks, biases, the neurons' parameters and their learnability, reset and surrogate are converted; the spikes
are equal. A mask of ``torch.nn.utils.prune`` has only single weights: the argument ``masks`` restores groups and larger
units. Recurrent neurons of snnTorch contain their connection V, whose bias is part of our b. The reset to zero of
``RLeaky`` differs from ours: it is refused on both sides.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.optimize import brentq
from torch import nn
from torch.nn.utils import prune

from g2g_kernels.choices import check_choice
from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.neurons.checks import check_parameter
from g2g_kernels.ops.neurons.surrogates import SURROGATES, Surrogate
from g2gnet.base.hooks import has_hooks, own_code
from g2gnet.base.optional import optional_package
from g2gnet.convolution import G2GConv2d
from g2gnet.interop.arrays import FINITE, Mask, numbers
from g2gnet.layers import G2GLinear, parameter_of
from g2gnet.neurons import NEURONS, SpikingNeurons
from g2gnet.spiking_network import READOUTS, SpikingNetwork
from g2gnet.stack import SpikingStack, plain_layers

#: snnTorch's class of a model, which begins with an R for the recurrent one, and its name for each of our parameters
_COUNTERPARTS = {
    "lif": ("Leaky", {"beta": "beta", "threshold": "threshold"}),
    "synaptic": ("Synaptic", {"syn_decay": "alpha", "beta": "beta", "threshold": "threshold"}),
}
#: our model of each class
_MODELS = {prefix + kind: model for model, (kind, _) in _COUNTERPARTS.items() for prefix in ("", "R")}
_OTHER_RESET = (
    "snn.RLeaky with reset to zero holds the membrane at zero for a step or, with reset_delay=False, passes gradients "
    "through the reset, our LIF does neither; train with reset by subtraction, or convert by NIR"
)
#: layers with weights
_LAYERS = nn.Linear, nn.Conv2d, G2GLinear
#: what may stand between layers and neurons
_BETWEEN = nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Flatten
_KINDS = " or ".join(", ".join(f"snn.{kind}" for kind in _MODELS).rsplit(", ", 1))


def from_snntorch(
    model: nn.Module,
    masks: Mapping[str, Mask] | None = None,
    *,
    T: int,  # noqa: N803  (the field's name for it)
    backend: str | None = None,
    readout: str | None = None,
) -> SpikingStack:
    """The stack that computes what the layers and neurons of ``model`` compute in turn at each step.

    The layers are taken in the order in which the model registered them (the order of ``model.named_modules()``);
    ``nn.Identity`` is skipped. Anything added by the model's own ``forward`` is ignored, even ``F.max_pool2d``: make
    it a module. A norm that the model trains takes the statistics of each step, the stack's those of all steps;
    in evaluation they are the same. Each module keeps its mode, a norm that is not trained too. Of a parametrized
    weight the value is taken, which then trains freely.

    Args:
        model: alternates ``nn.Linear`` or ``nn.Conv2d``, sparse or not, and ``snn.Leaky``, ``snn.Synaptic``, or behind
            ``nn.Linear`` ``snn.RLeaky`` or ``snn.RSynaptic``. Pools and ``nn.Flatten`` may stand before any of them,
            ``nn.BatchNorm2d`` directly behind a convolution.
        masks: by name of an ``nn.Linear``, also a recurrent one (``"lif1.recurrent"``), or of an ``nn.Conv2d``, what
            exists, as for :meth:`G2GLinear.from_linear` and :meth:`G2GConv2d.from_conv2d`. Others have the mask of
            ``torch.nn.utils.prune``, or every weight.
        T, backend: of the stack; a model does not say for how many steps inputs [B, D] are held.
        readout: of the stack: ``"counts"``, or a readout of the membranes of the last neurons, which need
            ``reset_mechanism="none"``. None: counts, refused for neurons without a reset.

    Raises ValueError for layers or options of neurons that the stack does not support, a module or a parameter in two
    places, or a readout that does not fit the neurons; TypeError for hooks, and for a ``forward`` of a layer's own;
    ImportError without snnTorch.

    Example:
        >>> import snntorch
        >>> from torch import nn
        >>> theirs = nn.Sequential(nn.Linear(64, 32), snntorch.Leaky(0.9), nn.Linear(32, 10), snntorch.Leaky(0.9))
        >>> from_snntorch(theirs, T=25)(torch.rand(2, 64)).shape  # held for 25 steps
        torch.Size([2, 10])
    """
    snn = optional_package("snntorch", "interop")
    linears: dict[str, Any] = {}
    neurons: dict[str, Any] = {}
    parts: list[Any] = []  # of the next connection, a layer by its name
    connections: list[list[Any]] = []
    kinds = tuple(getattr(snn, kind) for kind in _MODELS)
    for name, module in _modules_of(model, (*_LAYERS, *kinds)).items():
        if isinstance(module, (*_LAYERS, *kinds)):
            linear_next = len(linears) == len(neurons)
            if isinstance(module, _LAYERS) != linear_next:
                expected = "nn.Linear" if linear_next else _KINDS
                raise ValueError(
                    f"{name} is a {type(module).__name__}, but {expected} should come next; register modules in the "
                    "order in which they run"
                )
            (linears if linear_next else neurons)[name] = module
            if linear_next:
                parts.append(name)
            else:
                connections.append(parts)
                parts = []
        elif isinstance(module, _BETWEEN):
            parts.append(copy.deepcopy(module))
        elif not list(module.children()):
            outer = model.get_submodule(name.rpartition(".")[0])
            of = "" if outer is model else f" of a {type(outer).__name__}"
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}{of}; from_snntorch takes networks of nn.Linear, "
                f"nn.Conv2d, pools and {_KINDS}. Leave an nn.Dropout out and set `dropout` of the result; G2GLinear, "
                "LIF and Synaptic can be put into a model of another form one by one"
            )
    if linears and parts and len(linears) == len(neurons):
        behind = type(parts[0]).__name__
        raise ValueError(
            f"the {behind} is registered behind the last neurons, with which a stack ends; register it at its place, "
            "or leave it out and apply it to what the stack returns"
        )
    if not linears or len(linears) != len(neurons):
        raise ValueError(
            f"the model has {len(linears)} nn.Linear and {len(neurons)} {_KINDS}; each needs the "
            "other (behind a last nn.Linear alone, snn.Leaky(reset_mechanism='none'), whose membrane is read)"
        )
    recurrents = [f"{name}.recurrent" for name, theirs in neurons.items() if hasattr(theirs, "recurrent")]
    masks = masks or {}
    if unknown := set(masks) - set(linears) - set(recurrents):
        known = ", ".join([*linears, *recurrents])
        raise ValueError(f"masks names {', '.join(sorted(unknown))}; the linear layers are {known}")
    layers: list[Any] = []
    for (name, linear), (neurons_name, theirs), own in zip(linears.items(), neurons.items(), connections, strict=True):
        connection = _connection_from(name, linear, masks.get(name), backend)
        modules = [connection if isinstance(each, str) else each for each in own]
        joined = connection if len(modules) == 1 else nn.Sequential(*modules)
        layers.append([joined, _neurons_from(neurons_name, theirs, connection, backend)])
        if hasattr(theirs, "recurrent"):
            if isinstance(connection, G2GConv2d):
                raise ValueError(f"{neurons_name} is recurrent behind a convolution; from_snntorch has no form for it")
            mask = masks.get(f"{neurons_name}.recurrent")
            layers[-1].append(_recurrent_from(neurons_name, theirs, connection, mask))
    readout = _readout_of(neurons_name, theirs, readout)  # of the last neurons
    stack = SpikingStack(layers, T, backend, readout=readout)
    stack.training = model.training  # its modules have the modes of theirs
    return stack


def to_snntorch(stack: SpikingNetwork) -> nn.Sequential:
    """snnTorch's form of a chain: ``nn.Linear`` and ``snn.Leaky`` or ``snn.Synaptic``, ``fc1``, ``lif1``, …, one time
    step per call. Neurons with a recurrent connection are ``snn.RLeaky`` or ``snn.RSynaptic``.

    ``snntorch.utils.reset(model)`` resets the states that the neurons keep between calls (``init_hidden=True``), but
    leaves the last spikes of ``snn.RSynaptic``: call the layer's own ``reset_mem()``. A sparse layer is an
    ``nn.Linear`` with a mask of ``torch.nn.utils.prune``. Groups, units, dropout and the encoding of a :class:`G2GNet`
    are lost (``stack.encode`` gives the model's input). The last neurons of a stack with a readout of membranes have no
    reset and return spikes, which mean nothing, and membranes (``output=True``). Raises ValueError for neurons that
    snnTorch does not have, ImportError without snnTorch.

    Example:
        >>> from g2gnet import G2GNet
        >>> from snntorch import utils
        >>> theirs = to_snntorch(G2GNet(64, 32, 10, block_size=4))
        >>> utils.reset(theirs)
        >>> theirs(torch.rand(2, 64)).shape  # one time step
        torch.Size([2, 10])
    """
    snn = optional_package("snntorch", "interop")
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (connection, neurons, recurrent) in enumerate(plain_layers(stack, "to_snntorch"), 1):
        model = neurons.model_name
        if model not in _COUNTERPARTS:
            raise ValueError(f"lif{number}: snnTorch has no {model!r} neurons; only {', '.join(_COUNTERPARTS)} convert")
        kind, names = _COUNTERPARTS[model]
        if recurrent is not None and (f"R{kind}", neurons.reset) == ("RLeaky", "zero"):
            raise ValueError(f"lif{number}: {_OTHER_RESET}")
        modules[f"fc{number}"] = _linear_from_connection(connection)
        values = {names[name]: value for name, value in neurons.by_name.items()}
        options: dict[str, Any] = {
            "reset_mechanism": neurons.reset,
            "spike_grad": _spike_function(neurons.surrogate, neurons.alpha),
            "init_hidden": True,
        }
        for name, value in values.items():
            options[name] = value.detach().clone().reshape(() if value.numel() == 1 else value.shape)
            options[f"learn_{name}"] = isinstance(value, nn.Parameter)
        if number == stack.depth and stack.readout != "counts":
            options |= {"reset_mechanism": "none", "output": True}
        if recurrent is None:
            theirs = getattr(snn, kind)(**options)
        else:
            options["learn_recurrent"] = recurrent.values.requires_grad
            with torch.random.fork_rng(devices=[]):  # it draws weights, which are replaced at once
                theirs = getattr(snn, f"R{kind}")(**options, linear_features=connection.out_features)
            theirs.recurrent = _linear_from_connection(recurrent)
        for name, value in values.items():
            getattr(theirs, name).requires_grad_(value.requires_grad)
        modules[f"lif{number}"] = theirs.to(connection.values.device)
    return nn.Sequential(modules).train(stack.training)


def _modules_of(model: nn.Module, layers: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """The modules by name, without those inside of ``layers``, of which a stack takes over parameters and options.
    Raises unless these are all that there is, each in one place."""
    found: dict[str, nn.Module] = {}
    names: dict[nn.Module | nn.Parameter, str] = {}
    inside = ""
    for name, module in model.named_modules(remove_duplicate=False):
        nothing = isinstance(module, nn.Identity) or (type(module) is nn.Sequential and not len(module))
        if nothing or (inside and name.startswith(inside)):
            continue
        if names.setdefault(module, name) != name:
            raise ValueError(
                f"{names[module]} and {name} are one {type(module).__name__}, which would be two in a stack; register "
                "it once, or give each place a module of its own"
            )
        kind = next((kind for kind in (*layers, *_BETWEEN) if isinstance(module, kind)), None)
        found[name] = module
        if kind is None:
            if has_hooks(module):
                raise TypeError(f"{_words(name, module)} carries hooks, which a stack made of it would not have")
            continue
        inside = f"{name}."
        if kind.__module__.startswith("snntorch") and type(module) is not kind:
            own = f"{name} is a {type(module).__name__}, whose methods a stack would not have"
            raise TypeError(f"{own}; give snn.{kind.__name__}")
        if kind not in _LAYERS:  # after their weights are known
            _refuse_own_code(name, module, kind)
    for name, module in found.items():
        for parameter in module.parameters(recurse=isinstance(module, layers)):
            if names.setdefault(parameter, name) != name:
                raise ValueError(
                    f"{names[parameter]} and {name} share a parameter, which would be two in a stack; give each a copy"
                )
    return found


def _words(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _refuse_own_code(name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    if why := own_code(module, kind):
        raise TypeError(f"{_words(name, module)} {why}, which a stack made of it would not have")


def _readout_of(name: str, theirs: Any, readout: str | None) -> str:
    """The readout of a stack that ends with these neurons, whose membranes can be read if nothing resets them."""
    integrates = theirs.reset_mechanism == "none"
    if readout is not None:
        check_choice("readout", readout, READOUTS)
    if readout is None and integrates:
        raise ValueError(f"{name} has no reset; give readout='last', 'mean' or 'max' of its membranes, or 'counts'")
    if readout not in (None, "counts") and not integrates:
        raise ValueError(
            f"readout={readout!r} is of membranes that are not reset, but {name} has "
            f"reset_mechanism={theirs.reset_mechanism!r}; give it 'none', or read simulate(x, membranes=True)"
        )
    return "counts" if readout is None else readout


def _recurrent_from(name: str, theirs: Any, connection: G2GLinear, mask: Mask | None) -> G2GLinear:
    """The recurrent connection of neurons behind ``connection``, which gets its bias."""
    size, linear = connection.out_features, theirs.recurrent
    if not isinstance(linear, nn.Linear) or (linear.in_features, linear.out_features) != (size, size):
        raise ValueError(
            f"{name}.recurrent is {type(linear).__name__}({linear.extra_repr()}); from_snntorch takes "
            f"snn.{type(theirs).__name__} with linear_features={size}"
        )
    recurrent = _connection_from(f"{name}.recurrent", linear, mask, connection.backend)
    if recurrent.bias is not None:
        if connection.bias is None:
            connection.bias = recurrent.bias
        else:
            connection.bias.data += recurrent.bias.data
            connection.bias.requires_grad_(connection.bias.requires_grad or recurrent.bias.requires_grad)
        recurrent.bias = None
    return recurrent


def _connection_from(name: str, linear: Any, mask: Mask | None, backend: str | None) -> Any:
    weight, bias = (parameter_of(linear, each) for each in ("weight", "bias"))
    _refuse_own_code(name, linear, next(kind for kind in (G2GConv2d, *_LAYERS) if isinstance(linear, kind)))
    check_tensor("weight", weight, of=f" of {name}")
    size = len(numbers(f"{name}: weight", weight.flatten(1) if isinstance(linear, nn.Conv2d) else weight))
    if bias is not None:
        numbers(f"{name}: bias", bias, size)
    if isinstance(linear, nn.Conv2d):
        return G2GConv2d.from_conv2d(linear, mask, backend)
    if isinstance(linear, G2GLinear):
        linear, mask = linear.to_linear(), linear.mask if mask is None else mask
    return G2GLinear.from_linear(linear, mask, backend)


def _neurons_from(name: str, theirs: Any, connection: Any, backend: str | None) -> SpikingNeurons:
    snn = optional_package("snntorch", "interop")
    kind = next(kind for kind in _MODELS if isinstance(theirs, getattr(snn, kind)))
    model = _MODELS[kind]
    ours = NEURONS[model].__name__
    if (kind, theirs.reset_mechanism) == ("RLeaky", "zero"):
        raise ValueError(f"{name}: {_OTHER_RESET}")
    for option, value, remedy in (
        ("inhibition", theirs.inhibition, "inhibition=False"),
        ("state_quant", theirs.state_quant, "state_quant=False"),
        ("reset_delay=False", not theirs.reset_delay and theirs.reset_mechanism != "none", "reset_delay=True"),
        ("graded_spikes_factor", bool((theirs.graded_spikes_factor != 1).any()), "graded_spikes_factor=1"),
        ("learn_graded_spikes_factor", isinstance(theirs.graded_spikes_factor, nn.Parameter), "a fixed factor of 1"),
        ("surrogate_disable", theirs.surrogate_disable, "surrogate_disable=False"),
    ):
        if value:
            raise ValueError(f"{name}: our {ours} has no {option}; only snn.{kind} with {remedy}")
    surrogate, alpha = _surrogate_of(name, theirs.spike_grad)
    values = {parameter: getattr(theirs, their) for parameter, their in _COUNTERPARTS[model][1].items()}
    learned = {f"learn_{parameter}": isinstance(value, nn.Parameter) for parameter, value in values.items()}
    neurons = NEURONS[model](reset=theirs.reset_mechanism, surrogate=surrogate, alpha=alpha, backend=backend, **learned)
    for parameter, value in values.items():
        check = check_parameter if parameter == "threshold" else FINITE
        # of an image, whose size is not known yet, one number or one of each neuron
        size = connection.out_features if isinstance(connection, G2GLinear) else value.numel()
        shape = numbers(f"{name}: {parameter}", value, size, check).shape
        # a whole number makes it an integer there
        dtype = value.dtype if value.is_floating_point() else torch.float32
        mine = neurons.by_name[parameter]
        mine.data = value.detach().to(next(connection.parameters()).device, dtype, copy=True).reshape(shape)
        mine.requires_grad_(value.requires_grad)
    return neurons.train(theirs.training)


def _linear_from_connection(connection: G2GLinear) -> nn.Linear:
    linear = connection.to_linear()
    if not connection.mask.is_full:
        prune.custom_from_mask(linear, "weight", connection.mask.to_dense().to(linear.weight.dtype))
    return linear


def _alpha_of(surrogate: Surrogate, derivative: Callable[[float], float]) -> float | None:
    """The α of a surrogate with their derivative at 0, or at 1 where every α has the same at 0. None: no α fits."""

    def at(x: float, alpha: float) -> float:
        return surrogate.derivative(torch.tensor(x, dtype=torch.float64), alpha).item()

    x = 0.0 if at(0.0, 1.0) != at(0.0, 2.0) else 1.0
    value = derivative(x)
    try:
        exponent = brentq(lambda exponent: at(x, 10**exponent) - value, -30, 30)
    except ValueError:  # the derivative is larger, or smaller, for every α
        return None
    return float(f"{10**exponent:.6g}")


def _surrogate_of(name: str, spike_grad: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, float]:
    """Our name and α of a surrogate, identified by its derivative on a grid (snnTorch hides it in a closure)."""
    # far points too, where a wide boxcar is zero and a constant is not
    far = torch.tensor([1.5, 2.5, 5.0, 15.0, 50.0, 500.0], dtype=torch.float64)
    x = torch.cat([torch.linspace(-1, 1, 41, dtype=torch.float64), far, -far])
    probe = x.clone().requires_grad_()
    with torch.enable_grad():
        spikes = spike_grad(probe)
        (derivative,) = torch.autograd.grad(spikes.sum(), probe)
    if not torch.equal(spikes, (x > 0).to(spikes)):
        raise ValueError(f"{name}: spike_grad does not return 1 above 0 and 0 elsewhere, as our neurons' spikes are")
    derivative = derivative.nan_to_num(nan=0.0)  # a sigmoid's exponential overflows far out
    for surrogate, ours in SURROGATES.items():
        alpha = _alpha_of(ours, lambda point: derivative[int((x - point).abs().argmin())].item())
        if alpha is not None and torch.allclose(ours.derivative(x, alpha), derivative, rtol=1e-4, atol=1e-9):
            return surrogate, alpha
    raise ValueError(
        f"{name}: spike_grad is not one of g2g's surrogates ({', '.join(SURROGATES)}); give it one of them before, "
        f"for example {name}.spike_grad = snntorch.surrogate.atan()"
    )


def _spike_function(surrogate: str, alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
    functions = optional_package("snntorch.surrogate", "interop")
    if surrogate in ("atan", "fast_sigmoid", "sigmoid"):
        return getattr(functions, surrogate)(alpha)
    primitive = SURROGATES[surrogate].primitive

    def spike(x: torch.Tensor) -> torch.Tensor:  # snnTorch's triangular is another function, and it has no boxcar
        smooth = primitive(x, alpha)
        return (x > 0).to(x.dtype) + (smooth - smooth.detach())

    return spike
