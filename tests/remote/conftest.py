"""No test waits for long before it tries again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from server import Server

from surgery.remote import retry


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(attempts=5, unreached=2, first=0.005, longest=0.1))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Server]:
    """A server of `tmp_path`/web."""
    (tmp_path / "web").mkdir()
    with Server(tmp_path / "web") as server:
        yield server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub whose models are the folders `tmp_path`/hub/org/name; the library asks it, and keeps its cache in `tmp_path`."""
    from huggingface_hub import constants

    (tmp_path / "hub").mkdir()
    with Server(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
