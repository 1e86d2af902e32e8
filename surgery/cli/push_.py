"""surgery push OUT org/name"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

_LEFT_BEHIND = ("journal.jsonl", ".lock", ".replacing")  # by a run that is not finished
_NOT_SENT = [".cache/**", ".git/**", *_LEFT_BEHIND]


@click.command("push")
@click.argument("out", type=click.Path())
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch; default main.")
@click.option("--message", metavar="TEXT", help="The commit's message.")
def command(out: str, repo: str, private: bool, revision: str | None, message: str | None) -> None:
    """Publish OUT as the model ORG/NAME on the hub: weights, config, tokenizer and the model card.

    The repository is made if there is none. An upload that broke off goes on when the same command is given again. Outputs of
    runs that are not finished are refused, and so are folders whose headers and index do not belong together.

    \b
    Example:
      surgery push merged/ my-org/my-merge --private
    """
    folder = Path(os.path.expanduser(out))
    _check(folder)
    click.echo(_push(folder, repo, private=private, revision=revision, message=message))


def _check(folder: Path) -> None:
    """Raises Refused unless the folder holds something whole."""
    from surgery.adapter.find import weights_of
    from surgery.checkpoint.header import read_header
    from surgery.checkpoint.source import open_source
    from surgery.errors import Refused

    if not folder.is_dir():
        raise Refused(f"{folder}: no such directory", hint="name the directory that a run has written")
    if folder.name.endswith(".partial") or any((folder / name).exists() for name in _LEFT_BEHIND):
        raise Refused(f"{folder}: the run that writes it is not finished", hint="finish it with --resume, then push")
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        read_header(str(file))
    if not any(f.name.endswith(".delta.safetensors") for f in files) and weights_of(str(folder)) is None:
        open_source(str(folder))
    if not (folder / "README.md").is_file():
        hint = "write a README.md that says what it was made of, and under which licence"
        raise Refused(f"{folder}: has no model card", hint=hint)


def _push(folder: Path, repo: str, *, private: bool, revision: str | None, message: str | None) -> str:
    """Upload; returns the URL of the model's page."""
    from huggingface_hub import HfApi

    from surgery.errors import Refused

    hub: Any = HfApi()
    with _told(repo):
        page = hub.create_repo(repo, repo_type="model", private=private or None, exist_ok=True)
        if revision is not None:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        there = hub.list_repo_files(repo, revision=revision)
        stale = [f for f in there if f.endswith((".safetensors", ".safetensors.index.json")) and not (folder / f).is_file()]
        if stale:
            more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
            raise Refused(
                f"{repo}: holds {stale[0]}{more}, which {folder} has not: readers would mix the two up",
                hint="delete it there first, or push to another repository or --revision",
            )
        what = {"repo_id": repo, "folder_path": str(folder), "repo_type": "model", "ignore_patterns": _NOT_SENT}
        if hasattr(hub, "upload_large_folder"):  # until version 2 of the library the one that can be resumed
            hub.upload_large_folder(**what, revision=revision)
        else:
            hub.upload_folder(**what, revision=revision, commit_message=message or f"Upload {folder.name} with weight-surgery")
    return str(page)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """What the hub library raises, as one line. It wraps what happens to a single file, and lets its client's errors
    through, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    from surgery.errors import SurgeryError

    expected: Any = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
    try:
        yield
    except SurgeryError:
        raise
    except expected as problem:
        raise _error(repo, problem) from None


def _error(repo: str, problem: BaseException) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from surgery.errors import Failed, Refused

    again = "give the same command again: it goes on"
    if type(problem) is RuntimeError and isinstance(problem.__cause__, Exception):
        inner = _error(repo, problem.__cause__)
        return type(inner)(f"{str(problem).splitlines()[0].rstrip('.')}: {inner.message}", hint=inner.hint)  # type: ignore[attr-defined, call-arg]
    if isinstance(problem, OfflineModeIsEnabled):
        return Refused(f"{repo}: the hub is switched off (HF_HUB_OFFLINE)", hint="unset HF_HUB_OFFLINE")
    if isinstance(problem, HFValidationError | LocalTokenNotFoundError):
        return Refused(f"{repo}: {str(problem).splitlines()[0]}", hint="write org/name; `hf auth login` once")
    if isinstance(problem, HfHubHTTPError):
        status = getattr(problem.response, "status_code", None)
        if status in (401, 403):
            hint = "`hf auth login` with a token that may write there"
            return Refused(f"{repo}: the hub does not let you write there ({status})", hint=hint)
        return Failed(f"{repo}: the hub answers {status}", hint=again)
    said = str(problem).strip().splitlines()
    return Failed(f"{repo}: {said[0] if said else type(problem).__name__}", hint=again)
