"""Only the programs know flags: everything below them names settings and arguments."""

import ast
import re

from helpers import ROOT

from g2gnet.programs.flags import Parser, add_settings_flags

PROGRAMS = {
    "__main__",
    *(f"programs/{name}" for name in ("analyze", "crossval", "flags", "main", "output", "pretrain", "train")),
}
PROGRAMS |= {f"programs/{name}/program" for name in ("report", "sweep")}


def texts(path):
    """The strings of a module, docstrings included, with the first line of each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_no_module_below_the_programs_names_a_flag():
    found = []
    package = ROOT / "g2gnet"
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).with_suffix("").as_posix() in PROGRAMS:
            continue
        for line, text in texts(path):
            text = re.sub(r"(python -m |g2g-|train\.py ).*", "", text)  # a whole command is one in any case
            found += [f"{path.name}:{line}: {flag}" for flag in re.findall(r"(?<![\w-])--[A-Za-z]\w*", text)]
    found = [each for each in found if "--logdir" not in each]  # TensorBoard's own
    assert not found, "\n".join(found)


def test_a_program_makes_flags_of_the_settings_in_a_message():
    parser = Parser()
    add_settings_flags(parser)
    assert parser.in_flags("lower `lr`, or give `neuron=synaptic`") == "lower --lr, or give --neuron synaptic"
    assert parser.in_flags("`weights_only` is PyTorch's; lr stays") == "`weights_only` is PyTorch's; lr stays"
