"""The pieces of a SentencePiece model file, in order of id; read from the protobuf by hand, nothing is imported.

The file is a `ModelProto`: repeated field 1 is a `SentencePiece`, whose field 1 is the text of the piece
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgery.errors import Refused

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def sentencepieces(path: Path) -> list[str]:
    """The text of every piece. Raises Refused if the file is no such protobuf."""
    try:
        pieces = [_text(value) for field, value in _fields(path.read_bytes()) if field == 1]
    except (IndexError, ValueError):
        raise Refused(f"{path}: not a SentencePiece model") from None
    if not pieces:
        raise Refused(f"{path}: not a SentencePiece model: it has no pieces")
    return pieces


def _text(piece: bytes) -> str:
    return next(value for field, value in _fields(piece) if field == 1).decode("utf-8")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the length-delimited fields of a message; numbers are skipped. Raises ValueError, IndexError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field runs past the end")
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
