"""Notebooks of the documentation, run as programs: without Jupyter, and without a display."""

import ast
import json
from pathlib import Path
from typing import Any


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    """The cells of that kind."""
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run_cells(notebook: Path, smaller: dict[str, str] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """Runs the cells of a notebook in order; lines that begin with % are Jupyter's.

    Args:
        notebook: a file ``.ipynb``.
        smaller: what is replaced in the code, by what, to have it run in seconds.

    Returns:
        The names that the cells defined, and what each shows: the value of its last line, if that is an expression.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(cells(notebook), 1):
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        for large, small in (smaller or {}).items():
            code = code.replace(large, small)
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";") else None
        place = f"{notebook.name}, cell {number}"
        exec(compile(tree, place, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), place, "eval"), names))
    return names, shown
