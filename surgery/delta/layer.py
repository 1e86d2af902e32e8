"""What is coded chunk by chunk, as the manifest says it."""

from __future__ import annotations

from typing import Any

from surgery.delta.fingerprint import digest


class Layer:
    """What the manifest says of chunks with a check each, as they are written."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._checks: list[str] = []
        self._least = 0.0

    def add(self, payload: bytes, least: float = 0.0) -> None:
        """least: bytes that its symbols need at the least; a code that found more than single symbols may have needed fewer."""
        self.lengths.append(len(payload))
        self._checks.append(digest(payload)[:16])
        self._least += min(least, len(payload))

    def said(self, codec: str, *, limit: bool = True) -> dict[str, Any]:
        made: dict[str, Any] = {"codec": codec, "lengths": self.lengths, "checks": "".join(self._checks)}
        return made | ({"limit": int(self._least)} if limit else {})
