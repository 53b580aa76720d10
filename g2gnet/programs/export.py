"""Writes a trained network as C99 that runs without Python, by default in integers of eight bits."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2gnet.base.messages import OutputError, reason, say
from g2gnet.interop import quantize, to_c
from g2gnet.interop.c_code import bytes_of
from g2gnet.network_settings import SettingsError
from g2gnet.programs import flags
from g2gnet.programs.main import run_program
from g2gnet.programs.output import check_json, check_output
from g2gnet.training import read_run

EXAMPLE = """\
example:
  g2g-export --output network.c checkpoints/fashionmnist_mixer_p0.15_T50_current.pth
"""


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="g2g-export", description=__doc__, epilog=EXAMPLE)
    text = "the .pth file of a training run, finished or not"
    parser.add_argument("checkpoint", type=flags.file_name, metavar="CHECKPOINT", help=text)
    text = "the C file; the header is beside it (default: network.c)"
    parser.add_argument("--output", type=flags.file_name, default="network.c", metavar="FILE", help=text)
    text = "bits of a weight, in integers; 32: floats (default: those of the run's --quantize, or 8)"
    parser.add_argument("--bits", type=int, choices=(4, 8, 32), help=text)
    parser.add_argument("--prefix", default="g2g", metavar="NAME", help="what names in C begin with (default: g2g)")
    flags.add_json_flag(flags.add_inspection_flags(parser), "accuracy and sizes,")
    return parser


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    output = Path(arguments.output)
    files = output, output.parent / f"{output.stem}.h"
    for path in files:
        check_output(path, arguments)
    check_json(arguments, files)
    machine = flags.machine_from(arguments)
    run = read_run(arguments.checkpoint)
    data = flags.load_run_data(arguments, run.settings, machine.device)
    net = run.network(machine.device, machine.backend).eval()
    samples, labels = (each[: arguments.samples] for each in data.part("test"))
    asked = arguments.bits or run.settings.quantize or 8
    bits = None if asked == 32 else asked
    try:
        of_bits = None if bits is None else quantize(net, bits, data.part("train")[0])
        written = to_c(net if of_bits is None else of_bits, output, bits, prefix=arguments.prefix)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise OutputError(f"cannot write {output} ({reason(error)}); give another --output") from error
    code, header = (path.read_text(encoding="ascii") for path in written)
    found: dict[str, Any] = {
        "file": str(output), "bits": asked, "constant_bytes": bytes_of(code), "state_bytes": bytes_of(header),
        "samples": len(labels),
    }  # fmt: skip
    samples, labels = samples.cpu(), labels.cpu()
    trained = net.predict(samples).classes
    in_c = trained if of_bits is None else of_bits(samples).argmax(1)
    for name, classes in (("accuracy", trained), ("accuracy_in_c", in_c)):
        found[name] = float((classes == labels).double().mean())
    say(f"{run.path}: {run.position}")
    sizes = f"{found['constant_bytes']:,} bytes of constants, {found['state_bytes']:,} of state"
    say(f"{written[0]}, {written[1].name}: {sizes}")
    how = "float32" if bits is None else f"{bits} bits"
    say(f"{len(labels)} test samples: {found['accuracy']:.2%} as trained, {found['accuracy_in_c']:.2%} in {how}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(
        build_parser(), export, argv, interrupted="run the same command again, so that both files are of this network"
    )
