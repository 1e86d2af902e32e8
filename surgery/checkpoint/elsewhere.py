"""Checkpoints that lie elsewhere: which of the files are the weights, and the small files that go along with them.

Weights stay where they are. Config, tokenizer and licence are fetched: of a hub model into the hub's cache, else into a folder
that is removed when the process ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.checkpoint.files import MAX_TEXT, PICKLED, SIDECARS, Located, from_directory, parse_index
from surgery.checkpoint.scratch import scratch_folder
from surgery.errors import Refused
from surgery.remote.address import STORES, WEB, Address, parse
from surgery.remote.file import RemoteFile, in_parallel
from surgery.remote.folder import UNFINISHED
from surgery.remote.http import HttpFile
from surgery.remote.hub import HubFile, Repository, in_cache, repository, small_files
from surgery.remote.problems import Missing, RemoteProblem
from surgery.remote.store import StoreFile, list_folder

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_KNOWN = (  # what is looked for on a web server, which does not say what it has
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "README.md",
    "LICENSE", "LICENSE.txt", "NOTICE", "surgery.json",
)  # fmt: skip


def locate_url(location: str, scheme: str) -> Located:
    """A weight file, an index or a folder by its URL. Raises Refused."""
    try:
        if scheme in WEB:
            return _on_the_web(parse(location))
        if scheme in STORES:
            return _in_a_store(location.rstrip("/"))
    except RemoteProblem as problem:
        raise Refused(problem.message, hint=problem.hint) from None
    except ValueError as problem:
        raise Refused(f"{location}: not a URL: {problem}") from None
    known = ", ".join(f"{s}://" for s in ("hf", *WEB, *STORES) if s != "memory")
    raise Refused(f"{location}: {scheme}:// is not known", hint=f"known: {known}, paths, and hub ids such as org/name@revision")


def locate_on_hub(name: str, revision: str | None) -> Located | None:
    """A model of the hub, its weights left there (or taken from the cache, file by file, where it has them).

    None if its weights are pickles, which cannot be read by ranges. Raises Refused and the hub library's errors.
    """
    try:
        found = repository(name, revision)
    except RemoteProblem as problem:
        raise Refused(problem.message, hint=problem.hint) from None
    if found is None:
        return _cached(name, revision)
    top = [n for n in found.names if "/" not in n]
    if not any(n.endswith(".safetensors") for n in top) and any(n.endswith(PICKLED) for n in top):
        return None
    folder = small_files(found, SIDECARS)
    shards, wanted = _weights(top, name, lambda file: (folder / file).read_bytes())
    weights: list[str] = []
    remote: dict[str, RemoteFile] = {}
    for shard in shards:
        here = in_cache(found, shard)
        if here is None:
            file = _hub_file(found, shard)
            remote[file.url] = file
        weights.append(file.url if here is None else str(here))
    return Located(folder, weights, wanted, found.commit, remote)


def _hub_file(found: Repository, name: str) -> HubFile:
    if name not in found.names:
        raise Refused(f"{found.name}: has no {name}; its index names it", hint="the upload is not complete")
    return HubFile(found, name)


def _cached(name: str, revision: str | None) -> Located:
    """A model as the hub's cache has it; the hub is out of reach."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(name, revision=revision, local_files_only=True)
    return from_directory(Path(folder), Path(folder).name)


def _on_the_web(address: Address) -> Located:
    wanted: dict[str, str] | None
    if address.name.endswith(".index.json"):
        content = _fetched(address)
        if content is None:
            raise Missing(f"{address.shown}: not there", hint="check the address")
        shards, wanted = parse_index(_text(content, address.shown), address.shown)
        return _web(address, address.folder, shards, wanted)
    _check_ending(address.name, address.shown)
    if address.name.endswith(".safetensors"):
        return _web(address, address.folder, [address.name], None)
    single, index = in_parallel(lambda look: look(address), (_first_byte, _its_index))
    names = [_INDEX] * (index is not None) + [_SINGLE] * (single is not None)
    if not names:
        raise Missing(
            f"{address.shown}: has neither {_SINGLE} nor {_INDEX}",
            hint="give the URL of a folder with one of them, or of a .safetensors file",
        )
    shards, wanted = _weights(names, address.shown, lambda name: index or b"")
    return _web(address, address, shards, wanted)


def _web(address: Address, folder: Address, shards: Sequence[str], wanted: dict[str, str] | None) -> Located:
    files = [HttpFile(folder.inside(name), url=f"{folder.shown.rstrip('/')}/{name}") for name in shards]
    if wanted is None:
        files[0].begin(1)  # if there is something wrong with the weights, let it not be said of the small files
    contents = in_parallel(lambda name: _fetched(folder.inside(name)), _KNOWN)
    beside = _kept({n: c for n, c in zip(_KNOWN, contents, strict=True) if c is not None})
    return Located(beside, [f.url for f in files], wanted, None, {f.url: f for f in files}, address.shown)


def _fetched(address: Address) -> bytes | None:
    """A small file; None if it is not there, or if the server does not say whether it is: many answer 403 then."""
    try:
        return HttpFile(address).whole(MAX_TEXT)
    except Missing:
        return None
    except RemoteProblem as problem:
        if "(403" in problem.message:
            return None
        raise


def _its_index(folder: Address) -> bytes | None:
    return _fetched(folder.inside(_INDEX))


def _first_byte(folder: Address) -> bytes | None:
    """Of the single weight file; None if there is none."""
    try:
        return HttpFile(folder.inside(_SINGLE)).begin(1)
    except Missing:
        return None


def _in_a_store(url: str) -> Located:
    name = url.rpartition("/")[2]
    _check_ending(name, url)
    is_file = name.endswith((".safetensors", ".index.json"))
    folder = url.rpartition("/")[0] if is_file else url
    sizes = list_folder(folder)
    if UNFINISHED in sizes:
        raise Refused(f"{folder}: a run that writes it is not finished", hint="finish it: run the same recipe with --resume")

    def read(file: str) -> bytes:
        if sizes.get(file, 0) > MAX_TEXT:
            raise Refused(f"{folder}/{file}: is larger than {MAX_TEXT} bytes; no such file of a model is")
        return StoreFile(f"{folder}/{file}").begin(MAX_TEXT)

    if is_file and name not in sizes:
        raise Missing(f"{url}: not there", hint="check the address")
    wanted: dict[str, str] | None
    if name.endswith(".index.json"):
        shards, wanted = parse_index(_text(read(name), url), url)
    elif is_file:
        shards, wanted = [name], None
    else:
        shards, wanted = _weights(sizes, url, read)
    small = [n for n, size in sizes.items() if size <= MAX_TEXT and any(fnmatchcase(n, p) for p in SIDECARS)]
    beside = _kept(dict(zip(small, in_parallel(read, small), strict=True)))
    files = [StoreFile(f"{folder}/{shard}") for shard in shards]
    return Located(beside, [f.url for f in files], wanted, None, {f.url: f for f in files}, url)


def _weights(
    names: Iterable[str], place: str, read: Callable[[str], bytes]
) -> tuple[list[str], dict[str, str] | None]:
    """(shards, tensor -> shard or None) of a folder that holds `names`: by the same rules as of one on disk."""
    there = set(names)
    if {_SINGLE, _INDEX} <= there:
        raise Refused(
            f"{place}: holds both {_SINGLE} and {_INDEX}; which one is the model cannot be known",
            hint=f"name the file itself: {place}/{_INDEX}" if "://" in place else "download it and remove the stale one",
        )
    if _INDEX in there:
        return parse_index(_text(read(_INDEX), f"{place}/{_INDEX}"), f"{place}/{_INDEX}")
    found = [_SINGLE] if _SINGLE in there else sorted(n for n in there if n.endswith(".safetensors"))
    if len(found) == 1 and found[0].startswith("adapter_model"):
        raise Refused(f"{place}: holds an adapter ({found[0]}), not a model", hint="open it with a base: BASE+ADAPTER")
    if len(found) > 1:
        raise Refused(
            f"{place}: {len(found)} weight files ({', '.join(found[:4])}, …) and no {_INDEX} to say how they belong together",
            hint="download it and name one file, or restore the index",
        )
    if not found:
        other = ", ".join(sorted(there)[:6]) or "nothing"
        raise Refused(f"{place}: no weights in it (found {other})", hint="expected *.safetensors")
    return found, None


def _check_ending(name: str, url: str) -> None:
    if name.endswith((*PICKLED, ".gguf")):
        raise Refused(f"{url}: only safetensors files can be read where they are", hint="download it first")


def _text(content: bytes, index: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{index}: not an index file (it is not text)") from None


def _kept(files: dict[str, bytes]) -> Path | None:
    """A folder with these files, for as long as the process lives; None if there are none."""
    if not files:
        return None
    folder = scratch_folder()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
