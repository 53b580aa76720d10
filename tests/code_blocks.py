"""The Python of a page or notebook of the documentation, run as the one program that a reader makes of it."""

import ast
import contextlib
import doctest
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: a block of Python, and the block of text behind it, which is what it prints
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path, smaller: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs the blocks of a page in order, and returns the names that they define; raises AssertionError if one prints
    something else than the page says, in which ``...`` stands for anything. ``smaller`` says what is replaced in the
    code, by what, to have it run in seconds."""
    names: dict[str, Any] = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        code, expected = block.groups()
        for large, small in (smaller or {}).items():
            code = code.replace(large, small)
        # as many lines before it as in the page, so that a traceback names the page's line
        code = "\n" * text.count("\n", 0, block.start(1)) + code
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page.name, "exec"), names)
        if expected is not None:
            same = doctest.OutputChecker().check_output(expected, printed.getvalue(), doctest.ELLIPSIS)
            assert same, f"{page.name} says\n{expected}but its code prints\n{printed.getvalue()}"
    return names


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of code."""
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook: Path, smaller: Mapping[str, str]) -> list[Any]:
    """Runs the cells of a notebook in order, but for lines that begin with %, which are Jupyter's; returns what each
    shows: the value of its last line, if that is an expression."""
    names, shown = {"__name__": "__main__"}, []
    for number, cell in enumerate(cells(notebook), 1):
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        for large, small in smaller.items():
            code = code.replace(large, small)
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";") else None
        place = f"{notebook.name}, cell {number}"
        exec(compile(tree, place, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), place, "eval"), names))
    return shown
