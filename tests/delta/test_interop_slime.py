"""slime's disk deltas, read and written: against a decoder written from the description, chains, and everything that is refused."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from helpers import BF16, FP8, all_bytes, llama_config, read_checkpoint, same, write_checkpoint, write_json

from surgery.checkpoint.source import Source, open_source
from surgery.delta.interop.slime import export_slime, import_slime, open_version, versions_in
from surgery.errors import Refused

SUMS = {"xxh3-128": lambda b: xxhash.xxh3_128(b).hexdigest(), "adler32": lambda b: f"{zlib.adler32(b):08x}"}


def steps(count: int) -> list[dict[str, np.ndarray]]:
    """A model and what five steps of training make of it: few elements change, in every type."""
    rng = np.random.default_rng(0)
    now = {
        "embed.weight": rng.standard_normal((50, 16)).astype(BF16),
        "a.weight": rng.standard_normal((16, 16)).astype(np.float32),
        "b.weight": rng.standard_normal((8, 3, 2)).astype(FP8),
        "counts": np.arange(7),
        "scalar": np.array(0.5, np.float16),
        "still": rng.standard_normal(9).astype(BF16),
        "empty": np.zeros((0, 4), np.float32),
    }
    made = [now]
    for _ in range(count):
        now = {n: v.copy() for n, v in now.items()}
        for name in ("embed.weight", "a.weight", "b.weight"):
            flat = now[name].reshape(-1)
            at = rng.integers(0, flat.size, 6)
            flat[at] = (flat[at].astype(np.float32) * 1.5 + 0.25).astype(flat.dtype)
        now["a.weight"][0, 0] = [np.nan, -0.0, np.inf, 1e-45][len(made) % 4]
        now["counts"] = now["counts"] + 1
        made.append(now)
    return made


def checkpoint(folder: Path, tensors: dict[str, np.ndarray], shards: int = 2) -> Source:
    return open_source(str(write_checkpoint(folder, tensors, shards=shards, config=llama_config())))


def apply_as_slime_does(state: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """A receiver, from the published description: state holds flat bytes and comes back changed."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    meta = index["metadata"]
    assert meta["compression_format"] == "zstd"
    assert folder.name == f"weight_v{meta['version']}" and len(meta["version"]) == len(meta["base_version"]) == 6
    state = dict(state)
    for file in sorted(set(index["weight_map"].values())):
        raw = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        sums = header.pop("__metadata__")
        assert {n for n, f in index["weight_map"].items() if f == file} == set(header)
        for name, entry in header.items():
            assert entry["dtype"] == "U8"
            a, b = entry["data_offsets"]
            delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(raw[8 + length + a : 8 + length + b]), np.uint8)
            if meta["delta_encoding"] == "xor":
                state[name] = state[name] ^ delta
            else:
                (count,) = struct.unpack("<I", delta[:4].tobytes())
                where = np.frombuffer(delta[4 : 4 + 4 * count].tobytes(), "<u4")
                state[name] = state[name].copy()
                state[name][where] = delta[4 + 4 * count :]
            assert SUMS[meta["checksum_format"]](state[name].tobytes()) == sums[name]
    return state


def flat(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: np.frombuffer(np.ascontiguousarray(v).tobytes(), np.uint8) for n, v in tensors.items()}


@pytest.mark.parametrize("sums", ["xxh3-128", "adler32"])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_chain_of_five(tmp_path: Path, encoding: str, sums: str) -> None:
    models = steps(5)
    sources = [checkpoint(tmp_path / f"m{i}", m, shards=1 + i % 2) for i, m in enumerate(models)]
    for i in range(5):
        made = export_slime(sources[i], sources[i + 1], tmp_path / "deltas", version=i + 1, encoding=encoding, checksums=sums)
        assert made == tmp_path / "deltas" / f"weight_v{i + 1:06}"
    folders = list(versions_in(tmp_path / "deltas"))
    state = flat(models[0])
    for i, folder in enumerate(folders):
        state = apply_as_slime_does(state, folder)
        assert {n: b.tobytes() for n, b in state.items()} == {n: b.tobytes() for n, b in flat(models[i + 1]).items()}
        assert not {"still", "empty", "scalar"} & open_version(folder).tensors.keys()  # unchanged: not there
    before = all_bytes(tmp_path / "m0")
    done = import_slime(sources[0], folders, tmp_path / "out", base_version=0)
    assert done == {"version": 5, "changed": 4, "tensors": 7}
    same(read_checkpoint(tmp_path / "out"), models[5])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == llama_config()
    import_slime(sources[2], folders[2:4], tmp_path / "middle")
    same(read_checkpoint(tmp_path / "middle"), models[4])
    assert all_bytes(tmp_path / "m0") == before


def by_hand(folder: Path, base: dict[str, np.ndarray], target: dict[str, np.ndarray], **meta: str) -> Path:
    """A delta as slime's trainer writes it: nothing of ours, no base digest, files numbered from 0."""
    folder.mkdir(parents=True)
    header: dict = {"__metadata__": {}}
    data = b""
    for name, old in flat(base).items():
        new = flat(target)[name]
        if (old ^ new).any():
            payload = zstandard.ZstdCompressor(level=1).compress((old ^ new).tobytes())
            header["__metadata__"][name] = SUMS["xxh3-128"](new.tobytes())
            header[name] = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [len(data), len(data) + len(payload)]}
            data += payload
    raw = json.dumps(header).encode()
    (folder / "model-00000-of-00001.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    metadata = {"version": "000001", "base_version": "000000", "delta_encoding": "xor"}
    metadata |= {"compression_format": "zstd", "checksum_format": "xxh3-128", **meta}
    weight_map = dict.fromkeys([n for n in header if n != "__metadata__"], "model-00000-of-00001.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return folder


def test_what_slime_wrote_is_read(tmp_path: Path) -> None:
    base, target = steps(1)
    folder = by_hand(tmp_path / "weight_v000001", base, target)
    import_slime(checkpoint(tmp_path / "base", base), [folder], tmp_path / "out")
    same(read_checkpoint(tmp_path / "out"), target)


@pytest.mark.parametrize("stated", [True, False], ids=["with_base_digest", "checksums_only"])
def test_a_wrong_base_is_refused_and_untouched(tmp_path: Path, stated: bool) -> None:
    base, target = steps(1)
    if stated:
        folder = export_slime(checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "t", target), tmp_path, version=1)
    else:
        folder = by_hand(tmp_path / "weight_v000001", base, target)
    other = {n: v.copy() for n, v in base.items()}
    other["embed.weight"].view(np.uint16)[3, 3] ^= 1  # one bit
    wrong = checkpoint(tmp_path / "other", other)
    before = all_bytes(tmp_path / "other")
    with pytest.raises(Refused, match=r"is not the checkpoint|does not have its checksum") as caught:
        import_slime(wrong, [folder], tmp_path / "out")
    assert "nothing has been written" in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert all_bytes(tmp_path / "other") == before
    if stated:  # even one bit in a tensor that the delta does not touch
        other = {**base, "still": np.zeros_like(base["still"])}
        with pytest.raises(Refused, match="is not the checkpoint"):
            import_slime(checkpoint(tmp_path / "another", other), [folder], tmp_path / "out")


@pytest.mark.parametrize(
    ("order", "said"),
    [([1, 0], "leads from version 1 to 2, but would be applied to 0"), ([0, 2], "but would be applied to 1"), ([0, 0], "applied to 1"), ([], "no slime versions")],
)  # fmt: skip
def test_versions_must_chain(tmp_path: Path, order: list[int], said: str) -> None:
    models = steps(3)
    sources = [checkpoint(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
    folders = [export_slime(sources[i], sources[i + 1], tmp_path / "d", version=i + 1) for i in range(3)]
    with pytest.raises(Refused, match=said):
        import_slime(sources[0], [folders[i] for i in order], tmp_path / "out", base_version=0)
    assert not (tmp_path / "out").exists()


def test_damage_is_refused(tmp_path: Path) -> None:
    base, target = steps(1)
    source = checkpoint(tmp_path / "base", base)
    folder = export_slime(source, checkpoint(tmp_path / "t", target), tmp_path, version=1)
    file = next(folder.glob("*.safetensors"))
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    rng = np.random.default_rng(0)
    for at in [*rng.integers(8 * (8 + length), 8 * len(good), 60), *rng.integers(0, 8 * (8 + length), 30)]:
        raw = bytearray(good)
        raw[at // 8] ^= 1 << at % 8
        file.write_bytes(raw)
        try:
            import_slime(source, [folder], tmp_path / "out")
        except Refused:
            assert not (tmp_path / "out").exists()
            continue
        same(read_checkpoint(tmp_path / "out"), target)  # a bit that means nothing: a space in the header, a zstd flag
        for made in (tmp_path / "out").iterdir():
            made.unlink()
        (tmp_path / "out").rmdir()
    file.write_bytes(good[:-3])
    with pytest.raises(Refused, match="truncated"):
        import_slime(source, [folder], tmp_path / "out")


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_bombs_and_lies_are_refused(tmp_path: Path, encoding: str) -> None:
    base, target = steps(1)
    source = checkpoint(tmp_path / "base", {"w": base["a.weight"]})
    changed = {"w": target["a.weight"]}
    size = base["a.weight"].nbytes
    bad = {
        "bomb": zstandard.ZstdCompressor().compress(bytes(1 << 26)),
        "short": zstandard.ZstdCompressor().compress(b"\1\0\0"),
        "positions": zstandard.ZstdCompressor().compress(struct.pack("<III", 1, size, 0)[:9]),
        "count": zstandard.ZstdCompressor().compress(struct.pack("<I", 2**32 - 1)),
        "not zstd": b"hello there",
    }
    for name, payload in bad.items():
        folder = by_hand(tmp_path / name, {"w": base["a.weight"]}, changed, delta_encoding=encoding)
        header = {
            "__metadata__": {"w": "0" * 32},
            "w": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]},
        }
        raw = json.dumps(header).encode()
        (folder / "model-00000-of-00001.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + payload)
        with pytest.raises(Refused, match="damaged"):
            import_slime(source, [folder], tmp_path / "out")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"version": "one"}, "version is 'one'"),
        ({"base_version": ""}, "base_version is ''"),
        ({"delta_encoding": "add"}, "'add'"),
        ({"compression_format": "lz4"}, "'lz4'"),
        ({"checksum_format": "md5"}, "'md5'"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    base, target = steps(1)
    folder = by_hand(tmp_path / "weight_v000001", base, target, **metadata)
    with pytest.raises(Refused, match=said):
        import_slime(checkpoint(tmp_path / "base", base), [folder], tmp_path / "out")


def test_paths_that_escape(tmp_path: Path) -> None:
    base, target = steps(1)
    folder = by_hand(tmp_path / "d", base, target)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00000", "../model-00000"))
    with pytest.raises(Refused, match="points at"):
        import_slime(checkpoint(tmp_path / "base", base), [folder], tmp_path / "out")


def test_what_slime_cannot_say(tmp_path: Path) -> None:
    base, target = steps(1)
    old = checkpoint(tmp_path / "base", base)
    for name, tensors, said in [
        ("new", {**target, "extra": np.zeros(3, np.float32)}, "`extra` is new"),
        ("dropped", {n: v for n, v in target.items() if n != "still"}, "`still` was dropped"),
        ("resized", {**target, "still": np.zeros(10, BF16)}, "`still` is bfloat16 \\[10\\]"),
        ("retyped", {**target, "still": np.zeros(9, np.float32)}, "`still` is float32"),
    ]:
        with pytest.raises(Refused, match=said):
            export_slime(old, checkpoint(tmp_path / name, tensors), tmp_path / "d", version=1)
    assert not list((tmp_path / "d").glob("*"))
    same_again = checkpoint(tmp_path / "again", base)
    folder = export_slime(old, same_again, tmp_path / "d", version=1)  # nothing changed: an empty version
    import_slime(old, [folder], tmp_path / "out")
    same(read_checkpoint(tmp_path / "out"), base)
    with pytest.raises(Refused, match="already holds something"):
        export_slime(old, same_again, tmp_path / "d", version=1)
    with pytest.raises(Refused, match="unknown delta encoding"):
        export_slime(old, same_again, tmp_path / "e", version=1, encoding="xorr")
    with pytest.raises(Refused, match="counts from 000001"):
        export_slime(old, same_again, tmp_path / "e", version=0)


def test_blake3_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, target = steps(1)
    old, new = checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "t", target)
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(Refused, match="needs the package blake3"):
        export_slime(old, new, tmp_path / "d", version=1, checksums="blake3")

    class Stand:  # the library's interface, another hash: what is tested is that it is asked
        def blake3(self, data: bytes) -> hashlib._Hash:
            return hashlib.blake2s(data)

    monkeypatch.setitem(sys.modules, "blake3", Stand())
    folder = export_slime(old, new, tmp_path / "d", version=1, checksums="blake3")
    assert open_version(folder).digests["a.weight"] == hashlib.blake2s(target["a.weight"].tobytes()).hexdigest()
    import_slime(old, [folder], tmp_path / "out")
    same(read_checkpoint(tmp_path / "out"), target)
