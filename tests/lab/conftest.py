"""The digits rig, built once."""

from pathlib import Path

import pytest
from lab_rig import build_rig


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_rig(tmp_path_factory.mktemp("lab") / "rig")
