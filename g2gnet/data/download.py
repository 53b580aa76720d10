"""Downloads, with a progress bar on a terminal, silent in a pipe."""

import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.datasets.utils import check_integrity


def download(urls: Sequence[str], file: Path, md5: str) -> None:
    """Downloads ``file`` from the first address with this checksum; OSError with the error of each if none has it."""
    problems = []
    for url in urls:
        try:
            torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
        except (OSError, HTTPException) as error:
            problems.append(f"{url}: {error}")
            continue
        if check_integrity(file, md5):
            return
        file.unlink()
        problems.append(f"{url}: the file there does not have the published checksum")
    raise OSError("; ".join(problems))
