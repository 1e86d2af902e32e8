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
        """least: bytes that its symbols need at the least."""
        self.lengths.append(len(payload))
        self._checks.append(digest(payload)[:16])
        self._least += least

    def said(self, codec: str, *, limit: bool = True) -> dict[str, Any]:
        made: dict[str, Any] = {"codec": codec, "lengths": self.lengths, "checks": "".join(self._checks)}
        return made | ({"limit": round(self._least)} if limit else {})
