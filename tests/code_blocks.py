"""The blocks of Python in a page of documentation, run as the one program that a reader makes of them."""

import contextlib
import doctest
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: a block of Python, and the block of text behind it, which is what it prints
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path, smaller: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs the blocks of a page in order; raises AssertionError if one prints something else than the page says.

    Args:
        page: a Markdown file. ``...`` in what it says a block prints stands for anything.
        smaller: what is replaced in the code, by what, to have it run in seconds.

    Returns:
        The names that the blocks defined.
    """
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
