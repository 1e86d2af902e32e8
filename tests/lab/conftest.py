"""The digits rig, built once, and a folder with it for each test."""

from pathlib import Path

import pytest
from lab_rig import MERGE, Net, build_rig

import surgery.lab as lab


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_rig(tmp_path_factory.mktemp("lab") / "rig")


@pytest.fixture
def work(rig: Path, tmp_path: Path) -> Path:
    for name in ("base", "rot90", "inv", "other", "data", "tasks.yaml", "net.py"):
        (tmp_path / name).symlink_to(rig / name)
    (tmp_path / "merge.yaml").write_text(MERGE)
    return tmp_path


@pytest.fixture
def resident() -> lab.Resident:
    return lab.Resident(build=lambda config: Net(), threads=1)
