"""Models of the hub without a download: what a repository holds, and its files by byte ranges.

Everything is asked for at one commit, so that what is read belongs together whatever happens to the branch meanwhile. The hub
library says where (HF_ENDPOINT), as whom (`hf auth login`, HF_TOKEN), and what is in its cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from surgery.remote.address import parse
from surgery.remote.http import HttpFile
from surgery.remote.problems import Passing
from surgery.remote.retry import Attempts

_PASSING = (408, 429, 500, 502, 503, 504)


class Repository(NamedTuple):
    """A model at a commit. names: its files."""

    name: str
    commit: str
    names: list[str]


class HubFile(HttpFile):
    """A file of a model; its name in messages is `hf://org/name@commit/file`."""

    def __init__(self, repository: Repository, name: str) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        said = {k.lower(): v for k, v in build_hf_headers().items()}
        address = parse(hf_hub_url(repository.name, name, revision=repository.commit))
        super().__init__(
            address,
            url=f"hf://{repository.name}@{repository.commit}/{name}",
            headers={"Authorization": said["authorization"]} if "authorization" in said else {},
        )
        self.login = f"private, or its terms are not accepted: see the page of {repository.name}, then `hf auth login`"


def repository(name: str, revision: str | None) -> Repository | None:
    """Ask the hub what a model holds. None if it cannot be reached. Raises the hub library's errors otherwise."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    attempts = Attempts(reached=False)
    while True:
        try:
            found = HfApi().model_info(name, revision=revision)
            return Repository(name, str(found.sha), [s.rfilename for s in found.siblings or []])
        except OfflineModeIsEnabled:
            return None
        except HfHubHTTPError as problem:
            status = getattr(problem.response, "status_code", None)
            if status not in _PASSING:
                raise
            attempts.failed(Passing(f"{name}: the hub answers {status}"))
        except Exception as problem:  # the library's HTTP client, and so its errors, have changed with its versions
            if not any(word in type(problem).__name__.lower() for word in ("connect", "timeout")):
                raise
            return None


def small_files(repository: Repository, patterns: list[str]) -> Path:
    """A folder with the files of a model that match, fetched into the hub's cache. Raises the hub library's errors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        return Path(snapshot_download(repository.name, revision=repository.commit, allow_patterns=patterns))
    finally:
        if shown:
            enable_progress_bars()


def in_cache(repository: Repository, name: str) -> Path | None:
    """Where the hub's cache on this machine has a file, None if it has not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.name, name, revision=repository.commit)
    return Path(found) if isinstance(found, str) else None
