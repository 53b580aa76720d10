"""Writes docs/flags.md, the tables of flags, from the programs' own parsers: python docs/draw_flags.py."""

import argparse
import re
from pathlib import Path

from g2gnet.base.tables import markdown
from g2gnet.programs import analyze, crossval, export, pretrain, train
from g2gnet.programs.report import program as report
from g2gnet.programs.sweep import program as sweep

PAGE = Path(__file__).with_name("flags.md")
HEAD = """\
# Flags

Written by `python docs/draw_flags.py` from the programs' own parsers; a test checks it. Settings (data, model,
training, dynamic sparse training) decide what is computed and are saved in the checkpoint; the others are not. Each
program prints the same with `--help`. How to use them: [commands](commands.md).

A setting that has no effect beside the others is refused, with the remedy. Those of sparsity and rewiring (`--p_intra`,
`--p_inter`, `--num_groups`, `--cp`, `--cg`, `--dst_interval`, `--dst_fraction`) and `--warmup_epochs` are ignored with
a warning: one line of flags serves dense, sparse and rewired networks. Messages name settings as Python does:
`syn_decay=0.7` is `--syn_decay 0.7`.
"""
#: each program, the note under its heading, and the program whose flags it shares
PROGRAMS = (
    ("train.py", train, "Trains one network; installed, `g2g-train`.", None),
    (
        "crossval.py",
        crossval,
        "Trains k networks, each validated on another k-th of the training images; installed, `g2g-crossval`. It has\n"
        "the flags of `train.py`, but refuses those of held-out images; these are added or have other defaults:",
        train,
    ),
    (
        "g2g-sweep",
        sweep,
        "Trains every combination of several values of settings ([sweeps](sweeps.md)). Each setting of `train.py`\n"
        "takes one value or several, a switch `true` or `false`; these are added or have other defaults:",
        train,
    ),
    ("g2g-pretrain", pretrain, "Trains a ResNet-32 for `--use_resnet`.", None),
    ("g2g-analyze", analyze, "Analyses the network of a checkpoint.", None),
    ("g2g-report", report, "Writes an HTML page about one or several runs.", None),
    ("g2g-export", export, "Writes a trained network as C ([networks as C](c.md)).", None),
)


def flags(parser: argparse.ArgumentParser) -> dict[str, dict[str, argparse.Action]]:
    """The flags of each group by name, in the order of the help; those of no group come last."""
    groups = {}
    for group in (*parser._action_groups[2:], *parser._action_groups[:2]):
        actions = {" ".join(action.option_strings) or action.dest: action for action in group._group_actions}
        groups[group.title or ""] = {
            name: action for name, action in actions.items() if action.dest not in ("help", "version")
        }
    return {title: actions for title, actions in groups.items() if actions}


def row(name: str, action: argparse.Action) -> list[str]:
    meaning = re.sub(r" \(default: [^)]*\)", "", action.help or "")
    meaning = re.sub(r"--\w+", r"`\g<0>`", meaning)
    if action.choices:
        meaning += f"; one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    default = "off" if action.default is False else "–" if action.default is None else f"`{action.default}`"
    stated = re.search(r" \(default: ([^)]*)\)", action.help or "")
    if action.default is None and stated:
        default = stated[1]
    value = f" {action.metavar}" if isinstance(action.metavar, str) and action.option_strings else ""
    return [f"`{name}{value}`", default, meaning]


def page() -> str:
    """The text of docs/flags.md."""
    text = [HEAD]
    for name, module, note, shared in PROGRAMS:
        text.append(f"## Flags of `{name}`\n\n{note}\n")
        known = {}
        if shared is not None:
            known = {flag: action for group in flags(shared.build_parser()).values() for flag, action in group.items()}
        rows = {
            title: [
                row(flag, action)
                for flag, action in group.items()
                if flag not in known or action.default != known[flag].default
            ]
            for title, group in flags(module.build_parser()).items()
        }
        rows = {title: lines for title, lines in rows.items() if lines}
        if shared is not None:
            rows = {"": [line for lines in rows.values() for line in lines]}
        for title, lines in rows.items():
            heading = {"": "", "options": "### Others\n\n", "positional arguments": "### Arguments\n\n"}
            heading = heading.get(title, f"### {title[:1].upper()}{title[1:]}\n\n")
            text.append(heading + markdown(["flag", "default", "meaning"], lines) + "\n")
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
