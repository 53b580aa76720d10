"""Results that are computed from a data set once, and kept in a file."""

from collections.abc import Callable
from pathlib import Path

import torch

from g2gnet.base.files import one_at_a_time
from g2gnet.base.messages import reason, say, warn
from g2gnet.base.tensor_files import TensorFileError, read_tensors, write_tensors

#: tensors by the names of fields of :class:`~g2gnet.data.ImageData`
NamedTensors = dict[str, torch.Tensor]


def made_once(file: Path, what: str, make: Callable[[], NamedTensors]) -> NamedTensors:
    """The content of ``file``, whose name identifies it. If it is missing or damaged, the result of ``make``, which is
    then kept there. Messages call it ``what``. Other processes wait; a file that cannot be written is a warning."""
    with one_at_a_time(file):
        if file.exists():
            try:
                parts = read_tensors(file)
            except (OSError, TensorFileError) as error:
                warn(f"{file} is damaged ({reason(error)}) and will be rewritten")
            else:
                say(f"reading {what} from {file}")
                return parts
        parts = make()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, parts)
        except OSError as error:
            warn(f"{what} cannot be cached in {file} ({reason(error)}): the next run computes them again")
    return parts
