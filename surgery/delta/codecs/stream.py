"""zstd frames one after another: written with parameters that suit noise, read with every size known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from surgery.errors import Refused

WINDOW = 1 << 23  # no frame may ask a reader for a larger window
_NOISE = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, window_log=20, write_content_size=False, write_checksum=False
)
_TEXT = zstandard.ZstdCompressionParameters.from_level(19, window_log=23, write_content_size=True, write_checksum=False)


class Frames:
    """Collects frames of numbers. Long matches in noise cost more than they save: few are looked for."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(compression_params=_NOISE)
        self._frames: list[bytes] = []

    def add(self, data: NDArray[Any]) -> None:
        """One frame, nothing for no data."""
        if data.size:
            self._frames.append(self._compressor.compress(np.ascontiguousarray(data).data))

    def take(self) -> bytes:
        made = b"".join(self._frames)
        self._frames.clear()
        return made


class Unframed:
    """The content of consecutive frames, read in portions whose sizes the reader knows: nothing larger is ever made."""

    def __init__(self, data: bytes | memoryview) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW)
        self._reader = decompressor.stream_reader(data, read_across_frames=True)

    def take(self, count: int, dtype: Any = np.uint8) -> NDArray[Any]:
        """The next `count` numbers. Raises Refused if there are fewer."""
        made = np.empty(count, dtype)
        view, done = memoryview(made.view(np.uint8).reshape(-1)), 0  # type: ignore[arg-type]
        while done < len(view):
            try:
                got = self._reader.readinto(view[done:])
            except zstandard.ZstdError as problem:
                raise damaged(f"zstd: {problem}") from None
            if not got:
                raise damaged("it ends early")
            done += got
        return made

    def rest(self, most: int) -> NDArray[np.uint8]:
        """All that is left. Raises Refused if that is more than `most` bytes."""
        made = np.empty(most, np.uint8)
        view, done = memoryview(made), 0  # type: ignore[arg-type]
        try:
            while done < most and (got := self._reader.readinto(view[done:])):
                done += got
        except zstandard.ZstdError as problem:
            raise damaged(f"zstd: {problem}") from None
        self.end()
        return made[:done]

    def end(self) -> None:
        """Raises Refused if anything is left."""
        spare = bytearray(1)
        try:
            if self._reader.readinto(spare):
                raise damaged("it holds more than it should")
        except zstandard.ZstdError as problem:
            raise damaged(f"zstd: {problem}") from None


def pack_text(data: bytes) -> bytes:
    """One strongly compressed frame that states its content's size."""
    return zstandard.ZstdCompressor(compression_params=_TEXT).compress(data)


def unpack_text(data: bytes, size: int) -> bytes:
    """The content of one frame, which must be `size` bytes: no more is ever made. Raises Refused."""
    reader = Unframed(data)
    made = reader.take(size).tobytes()
    reader.end()
    return made


def damaged(what: str) -> Refused:
    return Refused(f"a payload is damaged: {what}", hint="fetch or make the package again")
