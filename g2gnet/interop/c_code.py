"""Networks as C99: one file that needs no library, no heap and no recursion, and with ``bits`` no floats. Its text is
in the folder ``c``, where ``$name`` is what depends on the network."""

import itertools
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from g2gnet.base.files import replace_file
from g2gnet.interop.plain import MODELS_IN_C, PlainConnection, PlainNetwork, plain
from g2gnet.interop.quantized import (
    DECAY_BITS,
    LARGEST,
    LARGEST_INPUT,
    IntegerNetwork,
    QuantizedNetwork,
    quantize,
)  # fmt: skip
from g2gnet.spiking_network import SpikingNetwork

TEXTS = Path(__file__).parent / "c"
#: what becomes of a step's membranes, by readout
READ = {
    "counts": "for (unsigned n = 0; n < spikes; n++) s->answer[s->spikes[n]]++;",
    "last": "memcpy(s->answer, u, sizeof s->answer);",
    "max": "for (unsigned i = 0; i < of->size; i++) s->answer[i] = u[i] > s->answer[i] ? u[i] : s->answer[i];",
    "mean": "{\n            s->steps[0]++;\n            for (unsigned i = 0; i < of->size; i++) "
    "s->answer[i] = (value)((s->total[i] += u[i]) / s->steps[0]);\n        }",
}
ANSWERS = {
    "counts": "the number of its spikes", "last": "its membrane", "max": "its largest membrane",
    "mean": "its mean membrane",
}  # fmt: skip
#: the smallest mean length of a run of targets for which runs take less time than single weights
RUN = 4
#: the longest gap between targets, and the longest run, that a byte holds; and those of two bytes
BYTE, WORD = 255, 65535


def to_c(
    net: SpikingNetwork | QuantizedNetwork,
    path: Path | str,
    bits: int | None = 8,
    calibration: Any = None,
    *,
    input_scale: float | None = None,
    held: bool | None = None,
    prefix: str = "g2g",
) -> tuple[Path, Path]:
    """Writes a network as C99, ``network.c`` and ``network.h``, for any machine with ``<stdint.h>`` and ``<string.h>``.

    Weights that exist are constants, and a spike adds those that leave it. The state is one struct of
    ``{PREFIX}_STATE_BYTES`` bytes. ``{prefix}_reset(&s)`` begins, ``{prefix}_step(&s, input)`` is one time step, and
    ``{prefix}_run(&s, sample, answer)`` a whole sample.

    Args:
        net: in evaluation mode; or what :func:`quantize` returned, whose integers are written.
        path: of the ``.c`` file; the header is beside it.
        bits: of a weight, 8 or 4, in integers (:mod:`g2gnet.interop.quantized`); None: float32, whose spikes are the
            network's own but for the order of sums.
        calibration, input_scale: as for :func:`quantize`; floats need neither.
        held: whether a sample [D] is held for all steps, or has T·D values; None: as the network's samples are.
        prefix: of the names, so that one program can have several networks, whose prefixes differ in more than case.

    Returns:
        the paths of both files.

    Raises:
        ValueError: naming what, for what has no exact meaning outside of PyTorch: modules and hooks of one's own,
            ``enc="rate"``, numbers that are not finite; nothing is written then.
        OSError: if a file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> from g2gnet import G2GNet
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     code, header = to_c(G2GNet(64, 32, 10, block_size=4), pathlib.Path(folder, "n.c"), bits=None)
        ...     print(code.name, header.name)
        n.c n.h
    """
    path = Path(path)
    if path.suffix != ".c":
        raise ValueError(f"the file is {path}; give a name that ends with .c")
    if not re.fullmatch(r"[\w .+-]+", path.name, re.ASCII):
        raise ValueError(f"the file is {path.name!r}, which C cannot include; give letters, digits, spaces and . _ + -")
    if not prefix.isidentifier() or not prefix.isascii():
        raise ValueError(f"prefix={prefix!r} cannot begin names in C; give letters, digits and _")
    if bits is not None and not isinstance(net, QuantizedNetwork):
        net = quantize(net, bits, calibration, input_scale=input_scale, held=held)
    integers = None
    if isinstance(net, QuantizedNetwork):
        of, integers = net.integers.plain, net.integers
        if held not in (None, of.held):
            raise ValueError(f"held={held}, but the integers are of samples with held={of.held}; give held to quantize")
    else:
        of = plain(net, held)
    header, code = (text.encode("ascii") for text in c_texts(of, integers, prefix, path.with_suffix(".h").name))
    replace_file(path.with_suffix(".h"), lambda file: file.write(header))
    replace_file(path, lambda file: file.write(code))
    return path, path.with_suffix(".h")


def c_texts(of: PlainNetwork, integers: IntegerNetwork | None, prefix: str, header: str) -> tuple[str, str]:
    """The header, whose file is called ``header``, and the code."""
    bits = None if integers is None else integers.bits
    weights = [each.weights for each in of.connections] if integers is None else integers.weights
    packed = [_packed(each, own, BYTE) for each, own in zip(of.connections, weights, strict=True)]
    wide = sum(len(each["weights"]) for each in packed) > 1.5 * of.num_weights  # many are of 0, where bytes end
    if wide:
        packed = [_packed(each, own, WORD) for each, own in zip(of.connections, weights, strict=True)]
    scales = "value unit, multiplier, half, right; /* of what arrives from populations, and from the input */"
    total = f"    {'float' if bits is None else 'int64_t'} total[{prefix.upper()}_OUTPUTS]; /* of membranes */\n"
    total += "    int32_t steps[1]; /* since the reset */\n"
    fields = {
        "prefix": prefix, "PREFIX": prefix.upper(), "header": header, "inputs": of.inputs, "steps": of.steps,
        "title": f"A spiking network of {of.num_weights} weights, written by g2gnet.", "output": of.output,
        "sample": of.inputs * (1 if of.held else of.steps), "outputs": of.populations[of.output].size,
        "of_sample": "held for all steps" if of.held else "step by step", "of_answer": ANSWERS[of.readout],
        "input_type": "float" if bits is None else "int16_t", "value_type": "float" if bits is None else "int32_t",
        "input_scale": "1.0f" if integers is None else f"{integers.input_scale:.9e}f",
        "of_input": "as the network takes it" if integers is None else f"from -{LARGEST_INPUT} to {LARGEST_INPUT}",
        "of_value": "float32" if bits is None else "in fixed point",
        "weight": "NIBBLE(by->weights, at)" if bits == 4 else "by->weights[at]",
        "scales": "" if bits is None else f"\n    {scales}",
        "left": "" if bits is None else " * of->unit", "arithmetic": _arithmetic(of, bits),
        "x": "*x" if bits or (of.scale, of.offset) == (1, 0) else "(*x * SCALE + OFFSET)",
        "fires": "u[i] > THRESHOLD(of, i)" + ("" if of.readout == "counts" else " && p != OUTPUT"),
        "read": READ[of.readout],
        "total": total if of.readout == "mean" else "", "gap_type": "uint16_t" if wide else "uint8_t",
    }  # fmt: skip
    fields |= _tables(of, integers, packed) | _time(of, bits, prefix)
    return _text("network.h", fields), _text("network.c", fields)


def _text(name: str, fields: Mapping[str, Any]) -> str:
    return Template(TEXTS.joinpath(name).read_text(encoding="ascii")).substitute(fields)


def _arithmetic(of: PlainNetwork, bits: int | None) -> str:
    """What the types of states are, and how they are multiplied."""
    name, more = "integers.c", ""
    if bits is None:
        name, more = "floats.c", f"#define SCALE {_number(of.scale)}\n#define OFFSET {_number(of.offset)}\n"
    elif bits == 4:
        more = (
            "/* Two weights are in a byte, the first in its lower half. */\n"
            "#define NIBBLE(bytes, at) (((int)((bytes)[(at) >> 1] >> ((at)&1) * 4 & 15) ^ 8) - 8)\n"
        )
    return _text(name, {"largest": LARGEST, "decay_bits": DECAY_BITS, "half": 1 << DECAY_BITS - 1}) + more


def _tables(of: PlainNetwork, integers: IntegerNetwork | None, packed: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Constants, the rows that name them, the sizes of the state and the types of places."""
    sizes = [each.size for each in of.populations]
    has_second = [each.model != "lif" for each in of.populations]
    reach = [max((_latest(each) for each in of.connections if each.source >= 0 and each.target == n), default=0)
             for n in range(len(sizes))]  # fmt: skip
    states, seconds = np.cumsum([0, *sizes]), np.cumsum([0, *np.multiply(sizes, has_second)])
    rings = np.cumsum([0, *np.multiply(sizes, np.add(reach, 1))])
    most = max(max(len(each["weights"]), len(each["gaps"])) for each in packed)
    place = "uint16_t" if most < 2**16 else "uint32_t"
    weight = "float" if integers is None else "int8_t" if integers.bits == 8 else "uint8_t"
    delay = "uint8_t" if max(map(_latest, of.connections)) <= BYTE else "uint16_t"
    types = {"weights": weight, "first": place, "gaps": "gap", "list": "uint16_t", "lists": place, "delays": delay}
    constants, connections, populations = [], [], []
    for number, (each, arrays) in enumerate(zip(of.connections, packed, strict=True)):
        name = _c_name(f"c{number}", each.name)
        if weight == "uint8_t":
            arrays = arrays | {"weights": _in_nibbles(arrays["weights"])}
        names = []
        for field, c_type in types.items():
            array = arrays.get(field)
            given = array is not None and len(array) > 0
            names.append(f"{name}_{field}" if given else "0")
            if array is not None and given:
                constants.append(_array(names[-1], c_type, array))
        ends = f"{'INPUT' if each.source < 0 else each.source}, {each.target}, {len(each.delays)}"
        connections.append(f"    {{{ends}, {', '.join(names)}}},")
    for n, population in enumerate(of.populations):
        own: Any = population if integers is None else integers.populations[n]
        arrays_of = {name: own.parameters[name] for name in MODELS_IN_C[population.model]} | {"bias": own.bias}
        *names, bias = [f"{_c_name(f'p{n}', population.name)}_{field}" for field in arrays_of]
        own_arrays = zip((*names, bias), arrays_of.values(), strict=True)
        constants += [_array(name, "value", array) for name, array in own_arrays]
        second = states[-1] + seconds[n] if has_second[n] else 0
        row = f"{population.size}, {states[n]}, {second}, {rings[n]}, {reach[n] + 1}"
        row += f", {population.reset.upper()}, {_receives(of, n)}"
        if integers is not None:
            row += f", {1 << own.left}, {own.multiplier}, {(1 << own.right) >> 1}, {own.right}"
        per_neuron = ", ".join(str(int(len(arrays_of[name]) > 1)) for name in MODELS_IN_C[population.model])
        populations.append(
            f"    {{{row}, {population.model}, {bias},\n     {{{', '.join(names)}}}, {{{per_neuron}}}}},"
        )
    if of.order is not None:
        constants.append(_array("order", "uint16_t" if of.order.size <= 2**16 else "uint32_t", of.order.ravel()))
    return {
        "states": states[-1] + seconds[-1], "second": ", and then second states" if any(has_second) else "",
        "arriving": rings[-1], "neurons": states[-1], "widest": max(sizes), "positions": len(sizes) + 1,
        "spike_type": "uint16_t" if max(sizes) <= 2**16 else "uint32_t",
        "weight_type": weight, "place_type": place, "delay_type": delay,
        "populations": len(sizes), "connections": len(packed), "constants": "\n".join(constants),
        "connection_table": "\n".join(connections), "population_table": "\n".join(populations),
        "models": "\n".join(_text(f"{name}.c", {}) for name in dict.fromkeys(each.model for each in of.populations)),
    }  # fmt: skip


def _c_name(number: str, name: str) -> str:
    """A name in C that no other has: a name in PyTorch may have any character but a dot."""
    return f"{number}_{re.sub(r'[^0-9A-Za-z]', '_', name)}"


def _latest(connection: PlainConnection) -> int:
    return int(connection.delays.max(initial=0))


def _receives(of: PlainNetwork, number: int) -> int:
    """Whether the input reaches a population: 0 not, 1 at once, 2 with delays."""
    own = [_latest(each) for each in of.connections if each.source < 0 and each.target == number]
    return 0 if not own else 2 if any(own) else 1


def _time(of: PlainNetwork, bits: int | None, prefix: str) -> dict[str, Any]:
    """What the steps of a sample are, and how long inputs are remembered."""
    lower, prefix = prefix, prefix.upper()
    steps = f"for (int t = 0; t < {prefix}_STEPS; t++)"
    if of.held:
        run = f"    hold(s, sample);\n    {steps} advance(s, sample, 1);\n"
    elif of.order is None:
        run = f"    {steps} advance(s, sample + t * {prefix}_INPUTS, 0);\n"
    else:
        of_step = f"for (int j = 0; j < {prefix}_INPUTS; j++) now[j] = sample[order[t * {prefix}_INPUTS + j]];"
        run = f"    input_value now[{prefix}_INPUTS];\n    {steps} {{\n        {of_step}\n"
        run += "        advance(s, now, 0);\n    }\n"
    lowest = "" if of.readout != "max" else f"-{LARGEST}" if bits else "-3.402823466e38f"
    late = max((_latest(each) for each in of.connections if each.source < 0), default=0)
    found = {"run": run, "history": 1, "remember": "", "late": "", "forget": "", "lowest": "", "hold": ""}
    if of.held:
        found["hold"] = _text("hold.c", {"prefix": lower})
    if lowest:
        found["lowest"] = f"    for (int i = 0; i < {prefix}_OUTPUTS; i++) s->answer[i] = {lowest};\n"
    if late:
        at, values = "s->at[POPULATIONS]", f"{prefix}_INPUTS"
        found["history"] = (late + 1) * of.inputs
        found["remember"] = f"    memcpy(s->history + {at} * {values}, input, {values} * sizeof *input);\n"
        place = f"({at} + {late + 1} - by->delays[j]) % {late + 1} * {values} + j % {values}"
        found["late"] = f"            if (by->delays) x = s->history + {place};\n"
        found["forget"] = f"    {at} = (uint16_t)(({at} + 1) % {late + 1});\n"
    return found


def _packed(connection: PlainConnection, weights: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """The arrays of a connection: the gap to the target of each weight, or lists of runs, of which sources may have the
    same, where these take fewer bytes; gaps and runs are at most ``most``."""
    first, singles, gaps = [0], [], []
    lists: dict[tuple[int, ...], int] = {}
    of_source, runs = [], 0
    for low, high in zip(connection.starts[:-1], connection.starts[1:], strict=True):
        targets, place = connection.targets[low:high], 0
        encoded = _runs(targets, most)
        of_source.append(lists.setdefault(encoded, len(lists)))
        runs += len(encoded) // 2
        for target, weight in zip(targets.tolist(), weights[low:high].tolist(), strict=True):
            skipped = max(0, (target - place - 1) // most)  # weights of 0 on the way
            gaps += [most] * skipped + [target - place - most * skipped]
            singles += [0] * skipped + [weight]
            place = target
        first.append(len(singles))
    found = {"delays": connection.delays if connection.delays.any() else np.zeros(0, np.int64)}
    ends = np.cumsum([0, *map(len, lists)])
    if len(weights) >= RUN * runs and ends[-1] + 2 * len(of_source) + 2 * len(ends) < len(gaps) and len(lists) < 2**16:
        found |= {
            "weights": weights,
            "first": connection.starts,
            "gaps": np.array([*itertools.chain(*lists)], np.int64),
        }
        return found | {"list": np.array(of_source), "lists": ends}
    found |= {"weights": np.array(singles, weights.dtype), "first": np.array(first)}
    return found | {"gaps": np.array(gaps, np.int64)}


def _runs(targets: np.ndarray, most: int) -> tuple[int, ...]:
    """Rising targets as pairs of numbers: the gap from the end of the run before, and the length."""
    encoded, end = [], 0
    for run in np.split(targets, np.flatnonzero(np.diff(targets) != 1) + 1) if len(targets) else ():
        gap, length = int(run[0]) - end, len(run)
        while gap > most:
            encoded += [most, 0]
            gap -= most
        while length > most:
            encoded += [gap, most]
            gap, length = 0, length - most
        encoded += [gap, length]
        end = int(run[-1]) + 1
    return tuple(encoded)


def _in_nibbles(weights: np.ndarray) -> np.ndarray:
    whole = np.pad(weights, (0, len(weights) % 2)) & 15
    return whole[::2] | whole[1::2] << 4


def _number(value: float) -> str:
    text = f"{np.float32(value):.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")


def _array(name: str, c_type: str, values: np.ndarray) -> str:
    """A constant array, in lines."""
    write = _number if np.issubdtype(values.dtype, np.floating) else str
    text = textwrap.fill(", ".join(map(write, values.tolist())), 110, initial_indent="    ", subsequent_indent="    ")
    return f"static const {c_type} {name}[{len(values)}] = {{\n{text}\n}};"


def bytes_of(text: str) -> int:
    """The bytes of the constants of a code, or of the struct of a header, on a machine of 32 bits."""
    sizes = {
        "float": 4,
        "value": 4,
        **{f"{sign}int{bits}_t": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    }
    for kind, name in re.findall(r"^typedef (\w+) (\w+);", text, re.MULTILINE):
        sizes[name] = sizes.get(kind, 0)
    arrays = re.findall(r"^(?:static const| +) ?(\w+) \w+\[(\d+|\w+_OUTPUTS)\]", text, re.MULTILINE)
    numbers = dict(re.findall(r"^#define (\w+) (\d+)", text, re.MULTILINE))
    return sum(sizes[kind] * int(numbers.get(count, count)) for kind, count in arrays if kind in sizes)
