"""Projections between populations: connections with delays, and the graph of modules that a set of them makes."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.choices import check_choice, check_flag
from g2g_kernels.numbers import FLOAT32, SIZE, Number
from g2g_kernels.ops.g2g_stack import Delay
from g2g_kernels.ops.g2g_stack.checks import check_events
from g2g_kernels.ops.g2g_stack.delays import WIDTH, late_of
from g2g_kernels.ops.g2g_stack.schedule import CycleError, components_of
from g2g_kernels.tracing import default_device, is_traced
from g2gnet import graphs
from g2gnet.images import Parts, Shape, checked_shape, parts_of, shape_behind
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons
from g2gnet.weights.whole_buffers import WholeBuffers

Pair = tuple[G2GLinear, SpikingNeurons]
#: steps of a delay
DELAY = Number(0, (1 << 16) - 1, whole=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """A connection from one population to another, or to itself, and how much later spikes arrive.

    Args:
        source: the name of a population, or ``"input"``.
        target: the name of a population.
        connection: from the source's neurons to the target's: a :class:`G2GLinear`; between images a
            :class:`G2GConv2d`, a pool (``nn.MaxPool2d``, ``nn.AvgPool2d``, :class:`SumPool2d`), or an
            ``nn.Sequential`` of pools, one layer, an ``nn.BatchNorm2d`` behind a convolution, and pools. Max pools take
            the maximum of spikes before a layer, of currents behind it.
        delay: whole steps, one for all or [N_src], one for each neuron of the source: numbers of Python or NumPy, an
            array, a tensor or a list. Kept as a number, or as int64 (float32 if learned) on the CPU.
        learn_delay: whether the delays are learned: d = round(clamp(d̂, 0, max_delay)) of a float parameter d̂ [N_src],
            for which ``delay`` is the initial value. On a cycle the clamp begins at 1.
        onto: what the target's neurons add it to: ``"current"``, their synaptic current if they have one (``Synaptic``,
            ``CubaLIF``) and else their membrane; or ``"membrane"``.
        max_delay: the largest delay that can be learned, or loaded; None: the largest in ``delay``. A state does not
            hold it: learned delays act by the ``max_delay`` of the network that they are loaded into.
        delay_width: σ, how many steps on either side of a spike the gradient of learned delays sees, 1 or more. It may
            be changed while training goes on (:attr:`SpikingNetwork.delay_width`).

    Raises:
        ValueError: for delays out of range, or of another number of neurons; if delays are learned without max_delay;
            for a width of delays that are not learned.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.sample(GroupLayout(32), GroupLayout(64), block_size=4)
        >>> Projection("v1", "lm", G2GLinear(mask), delay=3).most
        3
    """

    source: str
    target: str
    connection: nn.Module
    delay: Any = 0
    learn_delay: bool = False
    max_delay: int | None = None
    onto: str = "current"
    delay_width: int = 1

    def __post_init__(self) -> None:
        name = f"{self.source} → {self.target}"
        check_flag("learn_delay", self.learn_delay)
        check_choice("onto", self.onto, ("current", "membrane"), of=f" of {name}")
        if self.max_delay is not None:
            DELAY.check("max_delay", self.max_delay)
        elif self.learn_delay:
            raise ValueError(f"the delays of {name} are learned: give max_delay, the largest that they may become")
        if WIDTH.check(f"delay_width of {name}", self.delay_width) > 1 and not self.learn_delay:
            raise ValueError(
                f"delay_width={self.delay_width} of {name} is of gradients of learned delays; give learn_delay=True, "
                "or leave it out"
            )
        delays, neurons = _column(self.delay, "delay", name), getattr(self.connection, "in_features", None)
        if delays.dtype.kind not in ("iuf" if self.learn_delay else "iu"):
            raise ValueError(
                f"the delays of {name} are {self.delay!r:.40}; give whole numbers of steps, one or [N_src], or with "
                "`learn_delay` floats"
            )
        if delays.ndim and neurons is not None and delays.shape != (neurons,):
            raise ValueError(
                f"the delays of {name} have shape {list(delays.shape)}; give one number, or one for each of the "
                f"{neurons} neurons of the source"
            )
        most = DELAY.high if self.max_delay is None else self.max_delay
        if not ((delays >= 0) & (delays <= most)).all():
            found = delays.item() if not delays.ndim else f"from {delays.min():g} to {delays.max():g}"
            raise ValueError(f"the delays of {name} must be from 0 to {most:g} steps; these are {found}")
        steps = delays.astype(np.float32 if delays.dtype.kind == "f" else np.int64)
        object.__setattr__(self, "delay", torch.from_numpy(steps) if steps.ndim else steps.item())

    @classmethod
    def from_edges(
        cls,
        source: str,
        target: str,
        pre: Any,
        post: Any,
        weight: Any,
        delay: Any = None,
        sizes: tuple[int, int] | None = None,
        onto: str = "current",
    ) -> "list[Projection]":
        """The projections with these connections between single neurons, one projection for each delay.

        Args:
            source, target, onto: as of a projection.
            pre, post: the number of the source's and of the target's neuron of each connection: whole numbers in an
                array, a tensor, a list or a column of a data frame.
            weight: of each connection, or one for all; 0 is a weight that exists. Weights of one pair with one delay
                are added.
            delay: of each connection, or one for all, whole steps; None: 0.
            sizes: the numbers of neurons of both, (N_src, N_target).

        Raises:
            ValueError: for columns of different lengths, neurons outside ``sizes``, weights that are not finite, or
                delays out of range.

        Example:
            >>> columns = [0, 2, 2], [1, 0, 1], [0.5, -1.0, 2.0], [3, 1, 3]  # pre, post, weight, delay
            >>> edges = Projection.from_edges("v1", "lm", *columns, sizes=(3, 2))
            >>> [(each.delay, each.connection.values.flatten().tolist()) for each in edges]
            [(1, [-1.0]), (3, [0.5, 2.0])]
        """
        name = f"{source} → {target}"
        if not isinstance(sizes, tuple | list) or len(sizes) != 2:
            raise ValueError(f"the edges {name} need sizes=(neurons of {source}, neurons of {target})")
        sizes = SIZE.check(f"sizes[0] of {name}", sizes[0]), SIZE.check(f"sizes[1] of {name}", sizes[1])
        given = {"pre": pre, "post": post, "weight": weight, "delay": 0 if delay is None else delay}
        columns = {column: _column(values, column, f"the edges {name}") for column, values in given.items()}
        for column in ("weight", "delay"):
            if not columns[column].ndim:
                columns[column] = np.broadcast_to(columns[column], columns["pre"].shape)
        for column, values in columns.items():
            kinds = "fiu" if column == "weight" or not values.size else "iu"
            if values.shape != (columns["pre"].size,) or values.dtype.kind not in kinds:
                kind, found, remedy = "whole numbers", values.dtype.kind, ""
                if column == "weight":
                    kind = "numbers"
                elif found == "f":
                    remedy = "; .astype(int) converts whole ones"
                elif found in "OSU" and column != "delay":
                    remedy = "; pandas.factorize numbers names, those of pre and post together"
                raise ValueError(
                    f"{column} of the edges {name} is {values.dtype} {list(values.shape)}; give {kind}, one for each "
                    f"of {columns['pre'].size} edges{remedy}"
                )
        if columns["weight"].dtype != np.float32:  # narrower floats do not hold the bounds
            columns["weight"] = columns["weight"].astype(np.float64)
        for column, least, most, remedy in (
            ("pre", 0, sizes[0] - 1, f"there are {sizes[0]} neurons, numbered from 0"),
            ("post", 0, sizes[1] - 1, f"there are {sizes[1]} neurons, numbered from 0"),
            ("weight", -FLOAT32[1], FLOAT32[1], "give a finite number that a float32 holds"),
            ("delay", 0, DELAY.high, f"delays are from 0 to {DELAY.high} steps"),
        ):
            values = columns[column]
            if values.size and not (np.min(values) >= least and np.max(values) <= most):
                outside = np.flatnonzero(~((values >= least) & (values <= most)))
                raise ValueError(f"{column}[{outside[0]}] of the edges {name} is {values[outside[0]]}; {remedy}")
        delays = columns["delay"][:1]
        of_each: list[Any] = [slice(None)]
        if delays.size and columns["delay"].min() < columns["delay"].max():
            by_delay = np.argsort(columns["delay"], kind="stable")
            delays, starts = np.unique(columns["delay"][by_delay], return_index=True)
            of_each = np.split(by_delay, starts)[1:]
        none = torch.zeros(0, dtype=torch.int64)
        grid = BlockMask(GroupLayout(sizes[1], 1), GroupLayout(sizes[0], 1), none, none, block_size=1)
        made = []
        for each, chosen in zip(delays.tolist(), of_each[: len(delays)], strict=True):
            post_of, pre_of, own = (columns[column][chosen] for column in ("post", "pre", "weight"))
            made.append(cls(source, target, G2GLinear._from_edges(post_of, pre_of, own, grid), delay=each, onto=onto))
        return made

    @property
    def most(self) -> int:
        """The largest delay that it may have."""
        return int(torch.as_tensor(self.delay, device="cpu").max()) if self.max_delay is None else self.max_delay


def _column(values: Any, column: str, of: str) -> np.ndarray:
    """A column of a table as an array; ValueError, naming it (``of`` something), if an entry is missing."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    missing = np.flatnonzero(values.isna() if hasattr(values, "isna") else np.ma.getmaskarray(values))
    if len(missing):
        raise ValueError(f"{column}[{missing[0]}] of {of} is missing; give a number, or leave it out")
    return np.asarray(values)


class Ends(NamedTuple):
    """The names of a projection's source and target."""

    source: str
    target: str


class NumberedProjection(NamedTuple):
    """A projection inside a network: the names of its modules, and the numbers of its populations.

    Attributes:
        name: of the connection.
        source, target: the numbers of populations; −1: the input.
        least, most: the bounds of its delays; both 0: none.
        per_neuron: whether ``{name}_delay`` has a delay for each neuron of the source, and not one for all.
        onto: ``"membrane"`` where it adds to that in place of a synaptic current; None: to the current.
        width: how many steps on either side the gradient of its delays sees; 0: they are not learned.
    """

    name: str
    source: int
    target: int
    least: int
    most: int
    per_neuron: bool
    onto: str | None = None
    width: int = 0


class PopulationGraph(WholeBuffers):
    """The modules of a network: populations, the connections between them and their delays, and what is saved of them.
    Each projection has its delays in float32 as ``{name}_delay``, [] or [N_src]: a buffer, or if they are learned a
    parameter. They act rounded half to even; what is written, averaged or loaded there has to fit the projection.
    :class:`g2gnet.SpikingNetwork` runs it, and says what its arguments are."""

    def __init__(
        self,
        populations: Mapping[str, nn.Module],
        projections: Sequence[Projection] | Mapping[str, Projection],
        output: str,
        readout: str,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        named = dict(projections) if isinstance(projections, Mapping) else named_projections(projections)
        check_parts(populations, named, output, readout)
        parts = {name: parts_of(name, each.connection) for name, each in named.items()}
        #: what each projection does beside its weights
        self._paths = {name: each.path for name, each in parts.items()}
        #: the names of the populations, in the order in which a chain runs, the output last
        self.populations = in_order([*populations], named.values(), output)
        self.depth = len(self.populations)
        place = {name: number for number, name in enumerate(self.populations)} | {"input": -1}
        self._input_shape = None if input_shape is None else checked_shape(input_shape)
        ends = {name: Ends(each.source, each.target) for name, each in named.items()}
        self._shapes = shapes_of(ends, parts, self._input_shape)
        if self._shapes is not None:
            check_parameters(populations, self._shapes)
        numbered = []
        for target in self.populations:
            names = [name for name, each in named.items() if each.target == target]
            for name in names:
                self._add(name, parts[name].module)
                if (norm := parts[name].norm) is not None:
                    if norm.momentum is None and norm in self._modules.values():
                        raise ValueError(
                            f"{name} shares its norm, whose momentum=None counts one batch a run; give 0.1"
                        )
                    self._add(f"{name}_norm", norm)
                model: Any = getattr(populations[target], "model", None)
                other = named[name].onto != "current" and model is not None and model.takes is not None
                numbered.append(
                    self._add_delay(name, named[name], place)._replace(onto=named[name].onto if other else None)
                )
                if name == names[0]:
                    self._add(target, populations[target])
        self._set_projections(numbered)

    def _add(self, name: str, module: nn.Module) -> None:
        if not isinstance(name, str) or not name or "." in name or name.startswith("_"):
            raise ValueError(f"{name!r} cannot name a module; give a name without dots that begins with no underscore")
        # of the class: properties of it have no value yet
        if hasattr(type(self), name) or hasattr(self, name):
            raise ValueError(f"{name!r} is already an attribute of the network; choose another name")
        self.add_module(name, module)

    def _add_delay(self, name: str, projection: Projection, place: Mapping[str, int]) -> NumberedProjection:
        """Registers the delays of a projection, and numbers its populations by ``place``."""
        delays = torch.as_tensor(projection.delay, device="cpu")
        per_neuron = bool(delays.dim()) or projection.max_delay is not None
        if per_neuron and self._shapes is None:
            raise ValueError(f"{name} has a delay for each neuron, whose number is unknown; give input_shape=(C, H, W)")
        neurons = self.sizes[place[projection.source]] if per_neuron else 0
        if delays.dim() and len(delays) != neurons:
            raise ValueError(f"the delays of {name} have shape {list(delays.shape)}; give one number, or [{neurons}]")
        given = delays.expand(neurons) if per_neuron else delays
        if hasattr(self, f"{name}_delay"):
            raise ValueError(f"'{name}_delay' is the name of the delays of {name}; choose another one for the module")
        if projection.learn_delay:
            self.register_parameter(f"{name}_delay", nn.Parameter(given.to(default_device(), torch.float32).clone()))
        else:
            self.register_whole(f"{name}_delay", given, newer=not per_neuron)
        least = 0 if projection.learn_delay else int(delays.min())
        source, target = place[projection.source], place[projection.target]
        width = projection.delay_width if projection.learn_delay else 0
        return NumberedProjection(name, source, target, least, projection.most, per_neuron, width=width)

    def _set_projections(self, numbered: list[NumberedProjection]) -> None:
        self._cyclic = on_cycles(numbered, self.depth)
        learned = {each.name for each in numbered if each.width}
        self._projections = checked_projections(numbered, self._cyclic & learned, self._models())
        self._to = [[each for each in self._projections if each.target == number] for number in range(self.depth)]

    @property
    def input_shape(self) -> Shape | None:
        """The shape of an input, (C, H, W) or (D,); None: of images, before the first of them has come. It decides the
        sizes of populations; after that it stays."""
        return self._input_shape or (None if self._shapes is None else self._shapes["input"])

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each population by name, and of ``"input"``: (C, H, W), or (N,). What the activity has of an
        image is in the order of ``torch.flatten``: ``activity.rates["conv"].unflatten(0, net.shapes["conv"])``.

        Raises ValueError where it follows from inputs that have not come yet."""
        if self._shapes is None:
            raise ValueError(
                "the sizes of this network follow from its inputs: give it input_shape=(C, H, W), or call it once"
            )
        return self._shapes

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of neurons of each population, and at the end of inputs."""
        shapes = self.shapes
        return tuple([math.prod(shapes[name]) for name in (*self.populations, "input")])

    def _flat(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs as neurons; images [..., C, H, W] are flattened. The first of them decide the sizes."""
        if inputs.dim() < 4:
            if self._shapes is None:
                raise ValueError(
                    f"the input is {list(inputs.shape)}; give images [B, C, H, W] or [T, B, C, H, W], or the network "
                    "input_shape=(C, H, W)"
                )
            if tuple(inputs.shape) == self._shapes["input"] and inputs.shape[-1] != inputs.shape.numel():
                raise ValueError(f"the input is one image, {list(inputs.shape)}; give [B, C, H, W] or [T, B, C, H, W]")
            return inputs
        shape = tuple(inputs.shape[-3:])
        if self._shapes is None:
            parts = {each.name: Parts(self._paths[each.name], self._modules[each.name]) for each in self._projections}
            names = (*self.populations, "input")
            ends = {each.name: Ends(names[each.source], names[each.target]) for each in self._projections}
            found = shapes_of(ends, parts, shape)
            assert found is not None  # shapes of all follow from that of images
            check_parameters(self.neurons(), found)
            self._input_shape, self._shapes = shape, found
        elif self._shapes["input"] != shape and len(self._shapes["input"]) == 3:
            raise ValueError(
                f"the input has images {list(shape)}, and this network was made for {list(self._shapes['input'])}; "
                "make one for these, or resize them"
            )
        elif len(self._shapes["input"]) == 1 and not any(of.takes_images or of.flat for of in self._paths.values()):
            return inputs  # which operators refuse
        return _flat_events(inputs, shape) if inputs.layout == torch.sparse_coo else inputs.flatten(-3)

    def extra_repr(self) -> str:
        """What the connections do beside their modules."""
        lines = []
        for name, path in self._paths.items():
            if path.kind != "pool" and (path.before or path.after):
                before, after = ([f"{each.kind} pool {each.kernel}" for each in of] for of in (path.before, path.after))
                lines.append(f"({name}): " + ", ".join([*before, path.kind, *after]))
        return "\n".join(lines)

    def check_linear(self, where: str) -> None:
        """Raises ValueError, naming it, for a connection of images, which ``where`` has no form for."""
        for name, path in self._paths.items():
            if path.takes_images:
                kind = "reads images by a pool" if path.kind == "linear" else f"is a {path.kind}"
                raise ValueError(f"{where} has no form for {name}, which {kind}; it takes G2GLinear layers alone")

    def connections(self) -> dict[str, G2GLinear]:
        """All connections by name, from the input to the output."""
        modules: dict[str, Any] = self._modules
        return {each.name: modules[each.name] for each in self._projections}

    def neurons(self) -> dict[str, SpikingNeurons]:
        """The neurons of each population by name, the output last."""
        modules: dict[str, Any] = self._modules
        return {name: modules[name] for name in self.populations}

    def _size_of(self) -> dict[str, int]:
        """The number of neurons of each population."""
        return dict(zip(self.populations, self.sizes[:-1], strict=True))

    def _models(self) -> dict[str, str | None]:
        """The model of the neurons of each population; None: neurons of other people's."""
        return {name: getattr(neurons, "model_name", None) for name, neurons in self.neurons().items()}

    def layers(self) -> Iterator[Pair]:
        """The pairs (connection, neurons), from input to output: of a network that is no chain, each population's first
        connection from another one."""
        modules: dict[str, Any] = self._modules
        for number, name in enumerate(self.populations):
            yield next(modules[each.name] for each in self._to[number] if each.source != number), modules[name]

    def recurrents(self) -> list[G2GLinear | None]:
        """The connection of each population to itself (of several the first), or None."""
        modules: dict[str, Any] = self._modules
        to_itself = [[each.name for each in self._to[number] if each.source == number] for number in range(self.depth)]
        return [modules[names[0]] if names else None for names in to_itself]

    def projections(self) -> list[NumberedProjection]:
        """The projections, as numbers of populations and bounds of delays."""
        return list(self._projections)

    def delays(self, name: str) -> torch.Tensor:
        """The delays of the connection ``name`` as they act, int64 [N_src]."""
        self.settle()
        named = {each.name: each for each in self._projections}
        if name not in named:
            raise ValueError(f"{name!r} is not one of the connections {', '.join(named)}")
        own = named[name]
        delay = self.delay_of(own)
        if delay is not None and delay.steps is not None:
            return delay.steps
        return torch.full((self.sizes[own.source],), own.most)

    def delay_of(self, own: NumberedProjection) -> Delay | None:
        """The delays of a projection as operators take them, as they were settled; None: none."""
        if not own.most:
            return None
        if not own.per_neuron:
            return Delay(own.least, own.most)
        name = f"{own.name}_delay"
        if name in self._whole:
            steps = self.whole(name)
            return Delay(own.least, own.most, steps.clamp(own.least, own.most) if is_traced() else steps)
        learned: torch.Tensor = getattr(self, name)
        steps = learned.detach().clamp(own.least, own.most).round().long()
        # what is not a number has some delay
        return Delay(own.least, own.most, steps.clamp(own.least, own.most), learned, own.width)

    @property
    def delay_width(self) -> int:
        """How many steps on either side of a spike gradients of learned delays see (σ); 0 if no delays are learned.

        If projections differ, the largest. What is set holds for all that are learned. A state has as many steps more
        than the largest delay of what was sent, so one of another width is refused."""
        return max(each.width for each in self._projections)

    @delay_width.setter
    def delay_width(self, value: int) -> None:
        width = WIDTH.check("delay_width", value)
        if not self.delay_width:
            raise ValueError(f"delay_width={width} would change nothing: no delays of this network are learned")
        self._set_projections([each._replace(width=width if each.width else 0) for each in self._projections])

    def checked(self) -> Collection[str]:
        return {*super().checked(), *[f"{each.name}_delay" for each in self._projections]}

    def fitted(self, name: str, given: torch.Tensor, where: str) -> torch.Tensor:
        own = next((own for own in self._projections if f"{own.name}_delay" == name), None)
        if own is None:
            return super().fitted(name, given, where)
        size = self.sizes[own.source] if own.per_neuron or given.dim() else 0
        if own.per_neuron and not given.dim():
            given = given.expand(size).clone()
        if given.dim() and tuple(given.shape) != (size,):
            raise ValueError(f"{where} has shape {list(given.shape)}; give [{size}], or one for all")
        is_learned = name not in self._whole
        if is_learned and given.is_floating_point() and (given.dtype.itemsize < 4 or (given != given.round()).any()):
            return given  # which learning moves out of the bounds that it acts in
        steps = super().fitted(name, given, where)
        if not own.per_neuron:
            if not (steps == own.most).all():
                raise ValueError(
                    f"{where} is {_extremes(given)}; this network's is {own.most}: give its projection the delays "
                    "of the network that was saved"
                )
            return steps.flatten()[0]
        # 0 is a fixed delay; what only rounds to it on a cycle has acted as 1
        acts = (steps >= 0) & (steps <= own.most) & ~((steps == 0) & (given != 0) & (own.name in self._cyclic))
        if not acts.all():
            learned = "" if torch.equal(steps, given.to(steps)) else f"; learned ones act as net.delays({own.name!r})"
            raise ValueError(f"{where} is {_extremes(given)}; this network has room for 0 to {own.most}{learned}")
        return given if is_learned and given.is_floating_point() else steps

    def agree(self, fitted: Mapping[str, torch.Tensor]) -> None:
        numbered = []
        for each in self._projections:
            delays = None if f"{each.name}_delay" not in self._whole else fitted.get(f"{each.name}_delay")
            numbered.append(each if delays is None else each._replace(least=int(delays.min())))
        self._set_projections(numbered)

    def to_networkx(self) -> Any:
        """The whole network as a ``networkx`` graph (:func:`g2gnet.graphs.to_networkx`)."""
        return graphs.to_networkx(self)

    def _repr_html_(self) -> str:
        return graphs.to_html(self)


def _extremes(delays: torch.Tensor) -> str:
    least, most = float(delays.min()), float(delays.max())
    return f"{least:g}" if least == most else f"from {least:g} to {most:g}"


def named_projections(projections: Sequence[Projection]) -> dict[str, Projection]:
    """The projections by the names of their connections: ``a_to_b``, ``a_to_b_2``."""
    named: dict[str, Projection] = {}
    for each in projections:
        if not isinstance(each, Projection):
            raise TypeError(f"{type(each).__name__} is not a Projection; give Projection(source, target, connection)")
        name, count = f"{each.source}_to_{each.target}", 1
        while name in named:
            count += 1
            name = f"{each.source}_to_{each.target}_{count}"
        named[name] = each
    return named


def graph_of(projections: Sequence[NumberedProjection], count: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The graph of ``count`` populations, as :mod:`g2g_kernels.ops.g2g_stack.schedule` takes it."""
    return tuple([tuple([(each.source, each.least) for each in projections if each.target == n]) for n in range(count)])


def on_cycles(projections: Sequence[NumberedProjection], count: int) -> set[str]:
    """The names of the projections that are on cycles of ``count`` populations."""
    cycles = cycles_of(projections, count)
    return {each.name for each in projections if any({each.source, each.target} <= cycle for cycle in cycles)}


def cycles_of(projections: Sequence[NumberedProjection], count: int) -> list[set[int]]:
    """The numbers of those of ``count`` populations that reach one another."""
    together = components_of(graph_of([each._replace(least=1) for each in projections], count))
    return [{*component.members} for component in together if component.period]


def checked_projections(
    projections: Sequence[NumberedProjection], later: Collection[str], models: Mapping[str, str | None]
) -> tuple[NumberedProjection, ...]:
    """The projections between populations with these ``models`` by name, the delays of ``later`` ones, which are
    learned on cycles, at least 1. Raises ValueError for a cycle without delay."""
    checked = []
    for projection in projections:
        if projection.name in later:
            projection = projection._replace(least=1)
            if projection.most < 1:
                raise ValueError(f"{projection.name} is on a cycle, and max_delay={projection.most}; give at least 1")
        checked.append(projection)
    try:
        components_of(graph_of(checked, len(models)), late_of([*models.values()]))
    except CycleError as error:
        names = [*models]
        cycle = " → ".join(names[number] for number in (*error.cycle, error.cycle[0]))
        raise ValueError(f"{cycle} is a cycle without delay; give one of its projections one") from None
    return tuple(checked)


def in_order(names: list[str], projections: Collection[Projection], output: str) -> tuple[str, ...]:
    """The populations, each after those that it receives unless they are on one cycle, the output last."""
    place = {name: number for number, name in enumerate(names)} | {"input": -1}
    numbered = [NumberedProjection("", place[each.source], place[each.target], 1, 1, False) for each in projections]
    components = components_of(graph_of(numbered, len(names)))
    order = [names[number] for component in components for number in component.members]
    return (*[name for name in order if name != output], output)


def check_parts(
    populations: Mapping[str, nn.Module], projections: Mapping[str, Projection], output: str, readout: str
) -> None:
    """Raises unless these are the parts of a network, whatever their sizes."""
    if not isinstance(populations, Mapping):
        raise TypeError(f"populations is a {type(populations).__name__}; give a dict of the neurons by name")
    if not populations:
        raise ValueError("populations is empty; give the neurons of at least one by name")
    if "input" in populations:
        raise ValueError("'input' is the name of the network's input; call the population otherwise")
    if output not in populations:
        raise ValueError(f"output={output!r} is not one of the populations {', '.join(populations)}")
    for name, each in projections.items():
        for end, known in ((each.source, ["input", *populations]), (each.target, [*populations])):
            if end not in known:
                raise ValueError(
                    f"{name} joins {each.source!r} and {each.target!r}; {end!r} is not one of {', '.join(known)}"
                )
    reached, found_more = {"input"}, True
    while found_more:
        onward = {each.target for each in projections.values() if each.source in reached}
        found_more, reached = not onward <= reached, reached | onward
    for name in populations:
        if name not in reached:
            raise ValueError(f"no projections lead from the input to {name!r}; give some, or leave the population out")
    if readout == "counts":
        return
    if sender := next((name for name, each in projections.items() if each.source == output), None):
        raise ValueError(
            f"readout={readout!r} is of neurons that do not spike, but {sender} sends the spikes of {output}; leave it "
            "out, or give readout='counts'"
        )
    if not isinstance(populations[output], SpikingNeurons):
        raise TypeError(
            f"readout={readout!r} is of the membranes of the neurons of g2gnet, and {output} is a "
            f"{type(populations[output]).__name__}; give readout='counts'"
        )


def shapes_of(
    projections: Mapping[str, Ends], parts: Mapping[str, Parts], input_shape: Shape | None
) -> dict[str, Shape] | None:
    """The shape of each population, and of the input; None if it follows from inputs that have not come yet. Raises
    ValueError for sizes that do not match."""
    known: dict[str, tuple[str, Shape]] = {}  # and what says it
    if input_shape is not None:
        known["input"] = f"input_shape is {list(input_shape)}", input_shape

    def note(end: str, name: str, side: str, shape: Shape) -> None:
        this = f"{name} has {shape[0] if len(shape) == 1 else list(shape)} {side}"
        other, expected = known.setdefault(end, (this, shape))
        both = len(shape) == len(expected)
        if (shape != expected) if both else (math.prod(shape) != math.prod(expected)):
            raise ValueError(f"{this}, but {other}; these are the same neurons, of {end}")
        if not both and len(shape) == 3:
            known[end] = this, shape

    for name, each in projections.items():
        path, layer, _ = parts[name]
        if path.kind == "linear":
            note(each.target, name, "outputs", (layer.out_features,))
            if not path.takes_images:
                note(each.source, name, "inputs", (layer.in_features,))
    left = [name for name in projections if parts[name].path.takes_images]
    while left:
        ready = [name for name in left if len(known.get(projections[name].source, ("", ()))[1]) == 3]
        if not ready:
            break
        for name in ready:
            each, (path, layer, _) = projections[name], parts[name]
            source = known[each.source][1]
            note(each.target, name, "outputs", shape_behind(name, path, layer, source))
            if path.kind == "linear":
                pools = parts[name]._replace(path=path._replace(kind="pool"))
                found = math.prod(shape_behind(name, pools.path, None, source))
                if found != layer.in_features:
                    raise ValueError(f"{name} has {layer.in_features} inputs, but receives {found} pixels of {source}")
            left.remove(name)
    for name in left:
        sender = projections[name].source
        if sender in known and sender != "input":
            shape_behind(name, *parts[name][:2], known[sender][1])  # which raises
        elif input_shape is not None:
            shape_behind(name, *parts[name][:2], input_shape)
    return (
        None if left else {name: known[name][1] for name in ("input", *[each.target for each in projections.values()])}
    )


def check_parameters(populations: Mapping[str, nn.Module], shapes: Mapping[str, Shape]) -> None:
    """Raises ValueError unless neurons have one number of each parameter, or one for each of them."""
    for name, neurons in populations.items():
        for parameter, tensor in neurons.by_name.items() if isinstance(neurons, SpikingNeurons) else ():
            size = math.prod(shapes[name])
            if tensor.numel() not in (1, size):
                raise ValueError(
                    f"{name} has {tensor.numel()} numbers {parameter}, but {size} neurons; give "
                    f"{type(neurons).__name__}({size}, …), or one number"
                )


def _flat_events(images: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Sparse images [..., C, H, W] as neurons [..., C·H·W]."""
    if images.sparse_dim() < images.dim():
        raise ValueError(f"sparse images need {images.dim()} indices for each entry, not {images.sparse_dim()}")
    check_events(images)
    places, (_, rows, columns) = images._indices(), shape
    flat = (places[-3] * rows + places[-2]) * columns + places[-1]
    size = (*images.shape[:-3], math.prod(shape))
    return torch.sparse_coo_tensor(torch.cat([places[:-3], flat[None]]), images._values(), size)
