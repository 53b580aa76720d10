"""Records: files of JSON lines. The first says what was measured, where and with what; each of the others is a run."""

import json
from pathlib import Path
from typing import Any

from g2gnet.base.version import __version__

RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> dict[str, Any]:
    """A record: what its first line says, and ``"runs"``; raises ValueError if it is no record."""
    about, *runs = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {**about, "runs": runs}


def text(record: dict[str, Any]) -> str:
    """The lines of a record."""
    about = {name: value for name, value in record.items() if name != "runs"}
    lines = ({"g2g": __version__, **about}, *record["runs"])
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
