"""`surgery push` against a hub client that notes what it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import llama, read_file, write_raw

import surgery
from surgery.cli.push_ import command


class Hub:
    """Stands in for huggingface_hub.HfApi, versions from 2 on."""

    calls: list[tuple[str, dict[str, Any]]] = []
    there: list[str] = []
    problem: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.problem is not None:
            raise self.problem
        return f"https://huggingface.co/{repo_id}"

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def list_repo_files(self, repo_id: str, **options: Any) -> list[str]:
        return self.there

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


class OlderHub(Hub):
    def upload_large_folder(self, **options: Any) -> None:
        self.calls.append(("upload_large_folder", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    import huggingface_hub

    Hub.calls, Hub.there, Hub.problem = [], [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished output of ours."""
    a, b = (surgery.open(str(llama(tmp_path / name, i))) for i, name in enumerate("ab"))
    surgery.ops.average(a, b).save(tmp_path / "out")
    return tmp_path / "out"


def push(*args: Any) -> None:
    command.main([str(a) for a in args], standalone_mode=False)


def test_everything_goes_up_with_the_card(hub: type[Hub], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(out, "org/name", "--private")
    (create, made), (upload, sent) = hub.calls
    assert create == "create_repo" and made == {
        "repo_id": "org/name", "repo_type": "model", "private": True, "exist_ok": True
    }  # fmt: skip
    assert upload == "upload_folder" and sent["folder_path"] == str(out) and sent["repo_id"] == "org/name"
    assert sent["revision"] is None and sent["commit_message"] == "Upload out with weight-surgery"
    assert {"README.md", "surgery.json", "config.json", "model.safetensors"} <= {p.name for p in out.iterdir()}
    assert not any(p.name in sent["ignore_patterns"] for p in out.iterdir())
    assert capsys.readouterr().out.strip() == "https://huggingface.co/org/name"


def test_a_branch_and_a_message(hub: type[Hub], out: Path) -> None:
    push(out, "org/name", "--revision", "v2", "--message", "Second try")
    assert [c for c, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1]["private"] is None and hub.calls[1][1]["branch"] == "v2"
    assert hub.calls[2][1]["revision"] == "v2" and hub.calls[2][1]["commit_message"] == "Second try"


def test_older_libraries_upload_resumably_too(hub: type[Hub], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", OlderHub)
    push(out, "org/name")
    assert hub.calls[-1][0] == "upload_large_folder" and "commit_message" not in hub.calls[-1][1]


@pytest.mark.parametrize("trace", ["journal.jsonl", ".lock"])
def test_unfinished_outputs_are_refused(hub: type[Hub], out: Path, trace: str) -> None:
    (out / trace).touch()
    with pytest.raises(surgery.Refused, match="not finished"):
        push(out, "org/name")
    assert not hub.calls


def test_what_is_not_whole_is_refused(hub: type[Hub], out: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.Refused, match="no such directory"):
        push(tmp_path / "none", "org/name")
    out.rename(tmp_path / "x.partial")
    with pytest.raises(surgery.Refused, match="not finished"):
        push(tmp_path / "x.partial", "org/name")
    (tmp_path / "x.partial").rename(out)
    weights = out / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1])
    with pytest.raises(surgery.Refused, match="truncated"):
        push(out, "org/name")
    write_raw(weights, b"", kept)
    with pytest.raises(surgery.Refused):
        push(out, "org/name")
    weights.write_bytes(kept)
    assert read_file(weights)
    (out / "README.md").unlink()
    with pytest.raises(surgery.Refused, match="no model card"):
        push(out, "org/name")
    assert not hub.calls


def test_weights_that_would_stay_behind_are_refused(hub: type[Hub], out: Path) -> None:
    hub.there = ["README.md", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
    with pytest.raises(surgery.Refused, match=r"holds model.safetensors.index.json and 1 more, which .*out has not"):
        push(out, "org/name")
    assert [c for c, _ in hub.calls] == ["create_repo"]


def test_what_the_hub_answers_is_told_in_one_line(hub: type[Hub], out: Path) -> None:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    class Response:
        headers: dict[str, str] = {}
        request = None

        def __init__(self, status: int) -> None:
            self.status_code = status

    for status, kind, said in ((401, surgery.Refused, "does not let you"), (500, surgery.Failed, "answers 500")):
        hub.problem = HfHubHTTPError("no", response=Response(status))  # type: ignore[arg-type]
        with pytest.raises(kind, match=said):
            push(out, "org/name")
    hub.problem = OfflineModeIsEnabled("off")
    with pytest.raises(surgery.Refused, match="switched off"):
        push(out, "org/name")
