"""Finding the weight files of a checkpoint: one file, a directory, shards behind an index, a hub id, or a URL."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from surgery.errors import Refused
from surgery.remote.address import HUB, scheme_of
from surgery.remote.file import RemoteFile
from surgery.remote.mode import is_streaming

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", *PICKLED)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
JOURNAL = "journal.jsonl"  # lies in an output until it is complete
_LONGEST = 255  # bytes of a file's name
MAX_TEXT = 100_000_000  # bytes of a config, an index or a tokenizer: as for headers of weights
SIDECARS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
_TEXTS = [*(p.lower() for p in SIDECARS), "licence*", "*token*", "*vocab*", "*merges*", "*spiece*", "*sentencepiece*"]


class Located(NamedTuple):
    """Where a checkpoint's files are. `wanted` maps tensor -> file name when an index says so."""

    directory: Path | None  # with config and tokenizer; None for a bare file without neighbours
    weights: list[str]  # paths; URLs of those in `remote`
    wanted: dict[str, str] | None
    revision: str | None
    remote: Mapping[str, RemoteFile] | None = None
    location: str | None = None  # what the user wrote, without what must not be repeated


def locate(source: str) -> Located:
    """Resolve what the user wrote. Raises Refused with what was looked for."""
    scheme = scheme_of(source)
    if scheme == HUB:
        return _hub(source.partition("://")[2].strip("/"), stream=True)
    if scheme is not None:
        from surgery.checkpoint.elsewhere import locate_url

        return locate_url(source, scheme)
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return from_directory(path, None)
    name, _, revision = source.partition("@")
    local = Path(os.path.expanduser(name))
    if revision and local.exists():
        raise Refused(f"{source}: `@{revision}` names a hub revision, but {name} is a local path")
    if _HUB_ID.match(name):
        return _hub(source, stream=is_streaming())
    raise Refused(f"{source}: no such file or directory", hint="give a path, or a hub id such as org/name@revision")


def small_text(path: Path) -> str:
    """The content of a UTF-8 text file. Raises Refused if it is no plain file or too large, OSError and ValueError as usual."""
    if path.exists() and not path.is_file():
        raise Refused(f"{path}: is not a plain file", hint="do not use this checkpoint")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(size) if size <= MAX_TEXT else b""  # a size is allocated before it is read
    if size > MAX_TEXT:
        raise Refused(f"{path}: is larger than {MAX_TEXT} bytes; no such file of a model is", hint="do not use this checkpoint")
    return raw.decode("utf-8")


def check_links(directory: Path) -> None:
    """Refuse a directory whose weights, config, tokenizer or licence are a link to somewhere that holds no weights, or whose
    config, tokenizer or licence is a device.

    What such a link leads to would be read, or be copied into the output and published with it. Links between checkpoints and
    into a hub cache are common and fine.
    """
    for entry in os.scandir(directory):
        name = entry.name.lower()
        path = directory / entry.name
        holds_weights = name.endswith(_WEIGHTS)
        if entry.is_file(follow_symlinks=False) or not (holds_weights or any(fnmatchcase(name, p) for p in _TEXTS)):
            continue
        if path.is_dir() or not path.exists() or (holds_weights and not path.is_file()):
            continue
        if not path.is_file():
            raise Refused(f"{path}: is not a plain file", hint="do not use this checkpoint")
        target = path.resolve()
        if holds_weights:
            if not target.name.endswith(_WEIGHTS) and not _beside_weights(target.parent, directory.resolve()):
                raise Refused(
                    f"{path}: is a link to {target}, outside of this checkpoint and not a weight file by its name",
                    hint="if that is meant, put a copy of the file in the link's place",
                )
        elif not _beside_weights(target.parent, directory.resolve()):
            raise Refused(
                f"{path}: is a link to {target}, outside of this checkpoint; its content would be copied into the output",
                hint="if that is meant, put a copy of the file in the link's place",
            )


def _beside_weights(folder: Path, home: Path) -> bool:
    """Whether `folder` lies in `home`, holds weights itself, or is where a hub cache keeps files."""
    if folder == home or home in folder.parents:
        return True
    if folder.name == "blobs" and (folder.parent / "snapshots").is_dir():
        return True
    return any(entry.name.endswith(_WEIGHTS) for entry in os.scandir(folder))


def _file(path: Path) -> Located:
    check_links(path.parent)
    if path.name.endswith(".index.json"):
        return Located(path.parent, *_indexed(path), None)
    if path.suffix == ".safetensors" or path.suffix in PICKLED:
        return Located(path.parent, [str(path)], None, None)
    if path.suffix == ".gguf":
        raise _gguf(path)
    raise Refused(f"{path}: not a weight file", hint=f"known endings: .safetensors, {', '.join(PICKLED)}, .index.json")


def from_directory(path: Path, revision: str | None) -> Located:
    """The checkpoint in a folder on this machine. Raises Refused where it is not clear which files are its weights."""
    check_links(path)
    for single, index, pattern in (
        ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "*.bin"),
    ):
        has_single, has_index = (path / single).is_file(), (path / index).is_file()
        if has_single and has_index:
            raise Refused(
                f"{path}: holds both {single} and {index}; which one is the model cannot be known",
                hint=f"remove the stale one, or name the file itself: {path / index}",
            )
        if has_index:
            return Located(path, *_indexed(path / index), revision)
        if has_single:
            return Located(path, [str(path / single)], None, revision)
        found = sorted(f for f in path.glob(pattern) if f.is_file() and not f.name.startswith("training_args"))
        if len(found) == 1 and found[0].name.startswith("adapter_model"):
            raise Refused(f"{path}: holds an adapter ({found[0].name}), not a model", hint="open it with a base: BASE+ADAPTER")
        if len(found) == 1:
            return Located(path, [str(found[0])], None, revision)
        if found and (path / JOURNAL).is_file():
            raise unfinished(path)
        if found:
            names = ", ".join(f.name for f in found[:4])
            raise Refused(
                f"{path}: {len(found)} weight files ({names}, …) and no {index} to say how they belong together",
                hint="name one file, or restore the index",
            )
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise _gguf(ggufs[0])
    other = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise Refused(f"{path}: no weights in it (found {other})", hint="expected *.safetensors or pytorch_model*.bin")


def unfinished(path: Path) -> Refused:
    """What is said of a folder that a run has not finished writing."""
    return Refused(
        f"{path}: an output that is not complete: the run that writes it is still going, or was killed",
        hint="finish it: run the same recipe again with --resume",
    )


def _gguf(path: Path) -> Refused:
    return Refused(
        f"{path}: a GGUF file: an input of recipes, plans and edits, but not a checkpoint to be used as it lies",
        hint=f"unpack it first: python -c \"import surgery; surgery.open('{path}').save('unpacked')\"",
    )


def _indexed(index: Path) -> tuple[list[str], dict[str, str]]:
    try:
        text = small_text(index)
    except (OSError, ValueError):
        text = ""
    names, wanted = parse_index(text, str(index))
    for name in names:
        if not (index.parent / name).is_file():
            raise Refused(f"{index.parent / name}: missing; the index names it", hint="the download is not complete")
    return [str(index.parent / name) for name in names], wanted


def parse_index(text: str, index: str) -> tuple[list[str], dict[str, str]]:
    """(shards, tensor -> shard) of an index file. Raises Refused if it is none, or if a shard would lie elsewhere."""
    try:
        wanted = json.loads(text)["weight_map"]
        names = list(dict.fromkeys(wanted.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(f"{index}: not an index file (needs a `weight_map` of tensor -> file)") from None
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise Refused(f"{index}: points outside its directory: {name!r}", hint="do not use this checkpoint")
        if len(name.encode()) > _LONGEST:
            raise Refused(f"{index}: names a file of {len(name)} characters", hint="do not use this checkpoint")
    return names, wanted


def _hub(source: str, *, stream: bool) -> Located:
    """stream: its weights stay where they are; otherwise they are downloaded to the hub's cache."""
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition("@")
    if not _HUB_ID.match(repo):
        raise Refused(f"{source}: not a model of the hub", hint="write org/name, or org/name@revision")
    check_revision(source, revision)
    with _hub_refusals(repo, revision):
        if stream:
            from surgery.checkpoint.elsewhere import locate_on_hub

            found = locate_on_hub(repo, revision or None)
            if found is not None:
                return found._replace(location=source)
        kinds = _weights_on_hub(repo, revision or None)
        path = snapshot_download(repo, revision=revision or None, allow_patterns=[*kinds, *SIDECARS])
    return from_directory(Path(path), Path(path).name)._replace(location=source)


def check_revision(source: str, revision: str) -> None:
    """Raises Refused for what git allows no branch, tag or commit to be called. The hub library makes paths of its cache of
    them: `..` would lead out of it."""
    parts = revision.split("/") if revision else []
    if not revision.isprintable() or any(c in revision for c in " \\:?*[~^") or any(p.startswith(".") or not p for p in parts):
        raise Refused(f"{source}: `{ascii(revision)[1:-1]}` is no revision", hint="write org/name@BRANCH, @TAG or @COMMIT")


@contextmanager
def _hub_refusals(repo: str, revision: str) -> Iterator[None]:
    """What the hub library raises, as Refused."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        hint = f"accept its terms on the page of {repo}, then `hf auth login`"
        raise Refused(f"{repo}: the hub gives it only to those who have accepted its terms", hint=hint) from None
    except RepositoryNotFoundError:
        raise Refused(f"{repo}: no such path here and no such model on the hub", hint="private? run `hf auth login`") from None
    except RevisionNotFoundError:
        raise Refused(f"{repo}@{revision}: the hub knows the model but not this revision") from None
    except LocalEntryNotFoundError:
        raise Refused(
            f"{repo}: not a local path, not in the hub cache, and the hub cannot be reached",
            hint="check the path; offline, download it first with `hf download`",
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as problem:
        status = getattr(getattr(problem, "response", None), "status_code", None)
        login = "`hf auth login` with a token that may read it" if status in (401, 403) else None
        raise Refused(f"{repo}: the hub refused: {str(problem).splitlines()[0]}", hint=login) from None


def _weights_on_hub(repo: str, revision: str | None) -> list[str]:
    """Safetensors if the repository has any, so that the same weights are not fetched twice; else pickles."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError):
        return ["*.safetensors", "*.bin"]  # what the cache has decides
    except Exception as problem:
        if "connect" not in type(problem).__name__.lower():
            raise
        return ["*.safetensors", "*.bin"]
    return ["*.safetensors"] if any(f.endswith(".safetensors") for f in files) else ["*.bin"]
