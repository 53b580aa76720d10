"""Files of tensors, written completely and with a checksum, read without executing or trusting anything in them. A file
is the zip archive of ``torch.save``, so ``torch.load`` reads it, too. The archive's comment is the SHA-256 of all bytes
before it, which reveals truncation and any flipped bit."""

import hashlib
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from g2gnet.base.files import open_file, read_file, replace_file
from g2gnet.base.messages import reason

#: sizes of the digest, and of the record that ends a zip archive, without its comment
DIGEST_BYTES, END_BYTES = 32, 22


class TensorFileError(ValueError):
    """A file's content cannot be used."""


def write_tensors(path: Path, content: Any, keep: Path | None = None) -> None:
    """Replaces ``path`` by a file of ``content``: tensors, numbers, strings, None, and dicts, lists, tuples of them.
    The old file gets the name ``keep``. Raises OSError if it cannot be written, and TensorFileError for content that
    :func:`read_tensors` would refuse; the old file is then unchanged."""
    check_plain(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, lambda file: file.write(with_digest(buffer.getvalue())), keep)


def with_digest(archive: bytes) -> bytes:
    """The zip archive, which has no comment, with its digest as the comment."""
    # an archive ends with the length of its comment
    begin = archive[:-2] + struct.pack("<H", DIGEST_BYTES)
    return begin + hashlib.sha256(begin).digest()


def has_digest(path: Path) -> bool:
    """Whether a file ends like those of :func:`write_tensors`, damaged or not. Raises OSError if unreadable."""
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END_BYTES - DIGEST_BYTES))
        end = file.read()[:END_BYTES]
    return end.startswith(b"PK\5\6") and end.endswith(struct.pack("<H", DIGEST_BYTES))


def read_tensors(path: Path) -> Any:
    """The content that :func:`write_tensors` wrote, on the CPU. Raises OSError if the file cannot be opened or is not
    regular, and TensorFileError if it is damaged, or :func:`parse_tensors` refuses it."""
    data = read_file(path)
    if data[-DIGEST_BYTES:] != hashlib.sha256(data[:-DIGEST_BYTES]).digest():
        raise TensorFileError("its checksum is wrong: the file is damaged, or not one of ours")
    return parse_tensors(data)


def parse_tensors(data: bytes) -> Any:
    """The content of a file that ``torch.save`` wrote, on the CPU. Executes nothing, and takes a small multiple of the
    file's size of memory. Raises TensorFileError for other files and for other content than tensors, numbers, strings,
    None and containers of them, all values finite and no tensor larger than its data."""
    try:
        # PyTorch's older formats and archives that expand are refused
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise TensorFileError("its records are compressed, which PyTorch's never are")
        if sum(record.file_size for record in records) > len(data):
            raise TensorFileError("its records overlap")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        check_plain(content)
        return content
    except TensorFileError:
        raise
    except Exception as error:  # a damaged file can make zipfile and torch.load raise anything
        raise TensorFileError(f"it cannot be read ({reason(error)})") from error


def check_plain(content: Any) -> None:
    """Raises TensorFileError, naming the place, for content other than finite numbers, strings, None, plain tensors."""
    pending = [("", content)]
    seen: set[int] = set()  # containers may hold one another
    while pending:
        place, item = pending.pop()
        name = place.removeprefix("/") or "the content"
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.is_meta or item.is_quantized or item.is_nested:
                raise TensorFileError(f"{name} is not a plain tensor")
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise TensorFileError(f"{name} has shape {tuple(item.shape)}, but not as many values")
            if not torch.isfinite(item).all():
                raise TensorFileError(f"{name} holds values that are not finite")
        elif isinstance(item, dict | list | tuple):
            if id(item) in seen:
                continue
            seen.add(id(item))
            for key, value in item.items() if isinstance(item, dict) else enumerate(item):
                if type(key) not in (str, int):
                    raise TensorFileError(f"{name} has a key that is a {type(key).__name__}, not a string or a number")
                pending.append((f"{place}/{key}", value))
        elif isinstance(item, float) and not -float("inf") < item < float("inf"):
            raise TensorFileError(f"{name} is {item}")
        elif isinstance(item, int) and item.bit_length() > 63:
            raise TensorFileError(f"{name} is a whole number of {item.bit_length()} bits, where 63 are the most")
        elif item is not None and type(item) not in (str, int, float, bool):  # torch.load refuses their subclasses
            raise TensorFileError(f"{name} is a {type(item).__name__}, which has no place in such a file")
