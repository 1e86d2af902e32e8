"""An attack succeeds if code runs: every test here ends with a look at the file that such code would write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where code that should never run would leave its mark."""
    path = tmp_path_factory.mktemp("proof") / "ran"
    yield path
    assert not path.exists(), "code of an input was run"
