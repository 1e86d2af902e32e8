"""Torch files that are out to run code, to allocate, to loop, or to read what is not theirs."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import Refused

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None, **how: Any) -> Path:
    """A torch file around a pickle."""
    with zipfile.ZipFile(path, "w", **how) as made:
        made.writestr("archive/data.pkl", data)
        made.writestr("archive/version", "3\n")
        made.writestr("archive/byteorder", "little")
        for name, content in (records or {}).items():
            made.writestr(f"archive/{name}", content)
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def opcodes(proof: Path) -> dict[str, bytes]:
    """Every way in which a pickle calls something."""
    touch = f"open({str(proof)!r}, 'w').close()"
    shell = f"touch {proof}"
    return {
        "global_reduce": b"cos\nsystem\n(" + text(shell) + b"tR.",
        "global_posix": b"cposix\nsystem\n(" + text(shell) + b"tR.",
        "eval": b"cbuiltins\neval\n(" + text(touch) + b"tR.",
        "exec": b"cbuiltins\nexec\n(" + text(touch) + b"tR.",
        "stack_global": b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(shell) + b"tR.",
        "inst": b"(" + text(shell) + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text(shell) + b"o.",
        "newobj": b"\x80\x02csubprocess\nPopen\n(" + text(shell) + b"t\x81.",
        "newobj_ex": b"\x80\x04csubprocess\nPopen\n(" + text(shell) + b"t}" + text("shell") + b"\x88s\x92.",
        "build": b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb.",
        "partial": b"cfunctools\npartial\n(cos\nsystem\n" + text(shell) + b"tR(tR.",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR(" + text(shell) + b"tR.",
        "dotted": b"\x80\x04" + text("torch") + text("os.system") + b"\x93(" + text(shell) + b"tR.",
        "torch_hub": b"\x80\x02ctorch.hub\nload\n(" + text(str(proof.parent)) + text("x") + b"tR.",
        "torch_load": b"\x80\x02ctorch.serialization\nload\n(" + text(str(proof)) + b"tR.",
        "numpy_load": b"\x80\x02cnumpy\nload\n(" + text(str(proof)) + b"tR.",
        "runpy": b"\x80\x02crunpy\n_run_code\n(" + text(touch) + b"}tR.",
        "pip": b"\x80\x02cpip\nmain\n(]" + text("--version") + b"atR.",
        "copyreg": b"ccopyreg\n_reconstructor\n(cos\nsystem\ncbuiltins\nobject\nNtR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent_text": b"P" + shell.encode() + b"\n.",
        "persistent": b"\x80\x02" + text(shell) + b"Q.",
        "persistent_module": b"\x80\x02(" + text("module") + b"cos\nsystem\n" + text("x") + text("y") + b"tQ.",
        "persistent_class": b"\x80\x02(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x01tQ.",
        "hidden_in_reduce": b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\n(" + text(shell) + b"tR\x88}tR.",
        "no_stop": b"cos\nsystem\n(" + text(shell) + b"tR",
        "two_pickles": pickle.dumps({}, 2) + b"cos\nsystem\n(" + text(shell) + b"tR.",
        "dict_key": b"}cos\nsystem\n(" + text(shell) + b"tRK\x01s.",
    }


@pytest.mark.parametrize("name", opcodes(Path("x")))
def test_nothing_in_a_pickle_is_called(tmp_path: Path, proof: Path, name: str) -> None:
    data = opcodes(proof)[name]
    path = archive(tmp_path / "m.bin", data)
    with pytest.raises(Refused, match=r"m.bin: (refused to unpickle|holds)") as found:
        surgery.open(path)
    assert len(found.value.message) < 1000


def test_the_pickles_above_do_run_code_when_loaded_as_pickles(tmp_path: Path) -> None:
    """So that the test above tests something."""
    for name in ("global_reduce", "stack_global", "inst", "obj", "exec", "dict_key", "no_stop"):
        ran = tmp_path / name
        try:
            pickle.loads(opcodes(ran)[name])
        except Exception:
            assert name in ("no_stop", "dict_key")
        assert ran.exists(), name


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", place: str = "cpu") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text(place) + b"J" + struct.pack("<i", count) + b"tQ"


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0, of: bytes | None = None) -> bytes:
    sizes, steps = (b"(" + b"".join(map(number, ns)) + b"t" for ns in (shape, strides))
    return (
        b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + (of or storage()) + number(offset) + sizes + steps
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


LYING = {
    "larger_than_its_storage": tensor((1000,), (1,)),
    "far_beyond_the_file": tensor((10**12,), (1,)),
    "repeated_without_end": tensor((10**9, 10**9), (0, 0)),
    "repeated_beyond_64_bits": tensor((2**40, 2**40), (0, 0)),
    "begins_behind_its_storage": tensor((4,), (1,), offset=10**9),
    "begins_before_the_file": tensor((4,), (1,), offset=-(10**6)),
    "negative_size": tensor((-4,), (1,)),
    "negative_stride": tensor((4,), (-1,)),
    "strides_beyond_the_file": tensor((2, 2), (10**12, 1)),
    "storage_that_is_not_there": tensor((4,), (1,), of=storage("7")),
    "storage_of_another_record": tensor((4,), (1,), of=storage("../data.pkl")),
    "storage_with_a_path": tensor((4,), (1,), of=storage("../../../../etc/passwd")),
    "storage_larger_than_its_record": tensor((10**6,), (1,), of=storage(count=10**6)),
    "storage_of_negative_size": tensor((4,), (1,), of=storage(count=-4)),
    "storage_on_another_device": tensor((4,), (1,), of=storage(place="cuda:0")),
    "storage_on_meta": tensor((10**12,), (1,), of=storage(place="meta")),
}


@pytest.mark.parametrize("name", LYING)
def test_tensors_that_lie_about_where_they_are(tmp_path: Path, proof: Path, name: str) -> None:
    """Refused, or read as what they say within the file; nothing is allocated for what is claimed."""
    path = archive(tmp_path / "m.bin", LYING[name], {"data/0": b"\0" * 16})
    assert surgery.ops  # imported now: imports are not what is measured
    tracemalloc.start()
    try:
        opened = surgery.open(path)
        (stored,) = opened.node.source.tensors.values()
        assert stored.offset >= 0 and stored.offset + stored.span <= path.stat().st_size and stored.nbytes <= path.stat().st_size
        opened.save(tmp_path / "out")
    except surgery.SurgeryError as found:
        assert "m.bin" in found.message
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40e6  # torch's modules, on their first import; never what a tensor claims


def test_the_honest_tensor_of_the_lying_ones_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.bin", tensor((2, 2), (2, 1)), {"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert surgery.open(path)["x"].compute().tolist() == [[1, 2], [3, 4]]


def test_a_state_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    data = b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s."
    pickletools.dis(data, out=io.StringIO())
    with pytest.raises(Refused, match=r"m.bin: holds"):
        surgery.open(archive(tmp_path / "m.bin", data))


@pytest.mark.parametrize("key", [b"K\x01", b"N", b"(K\x01K\x02t", b"\x8a\xff" + b"\x7f" * 255, text("a\x1b[2J"), text("a\nb")])
def test_names_that_are_none(tmp_path: Path, key: bytes) -> None:
    data = LYING["larger_than_its_storage"].replace(text("x"), key)
    with pytest.raises(Refused):
        surgery.open(archive(tmp_path / "m.bin", data, {"data/0": b"\0" * 16}))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    for i, value in enumerate(
        [
            torch.eye(3).to_sparse(),
            torch.eye(4).to_sparse_csr(),
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            torch.ones(3, dtype=torch.complex64).conj(),
            torch._neg_view(torch.ones(3)),
            torch.empty(3, device="meta"),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        ]
    ):
        torch.save({"x": value}, tmp_path / f"{i}.bin")
        with pytest.raises(Refused, match=rf"{i}.bin: "):
            surgery.open(tmp_path / f"{i}.bin")


def test_a_compressed_pickle_is_not_unpacked(tmp_path: Path) -> None:
    """100 MB of pickle in 100 kB of file."""
    path = archive(tmp_path / "m.bin", b"(" + b"]" * 10**8 + b".", compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    with pytest.raises(Refused, match="is compressed"):
        surgery.open(path)


def polyglot(folder: Path, proof: Path) -> Path:
    """A tar file, which torch's old reader takes, with a zip behind it."""
    path = folder / "m.bin"
    with tarfile.open(path, "w") as made:
        for name in ("storages", "tensors", "pickle"):
            data = b"cos\nsystem\n(" + text(f"touch {proof}") + b"tR."
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    torch.save({"x": torch.ones(2)}, folder / "honest.bin")
    path.write_bytes(path.read_bytes() + (folder / "honest.bin").read_bytes())
    return path


def magic(folder: Path, proof: Path) -> Path:
    """Torch's format from before zip, with a call in it, and a zip behind it."""
    torch.save({"x": torch.ones(2)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    honest = folder / "honest.bin"
    torch.save({"x": torch.ones(2)}, honest)
    path = folder / "m.bin"
    path.write_bytes(b"cos\nsystem\n(" + text(f"touch {proof}") + b"tR." + (folder / "old.bin").read_bytes() + honest.read_bytes())
    return path


@pytest.mark.parametrize("make", [polyglot, magic])
def test_old_formats_in_disguise(tmp_path: Path, proof: Path, make: Callable[[Path, Path], Path]) -> None:
    path = make(tmp_path, proof)
    assert zipfile.is_zipfile(path)
    with pytest.raises(Refused, match="not in torch's zip format"):
        surgery.open(path)


def test_broken_archives(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(64)}, tmp_path / "whole.bin")
    raw = (tmp_path / "whole.bin").read_bytes()
    path = tmp_path / "m.bin"
    for cut in range(0, len(raw), 37):
        path.write_bytes(raw[:cut])
        with pytest.raises(Refused):
            surgery.open(path)
    for content in (b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 100, b"PK\x05\x06" + b"\0" * 18, raw[:100] + raw[160:]):
        path.write_bytes(content)
        with pytest.raises(Refused):
            surgery.open(path)


def test_nobody_is_told_to_switch_the_protection_off(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Which is what torch says first of a pickle that it cannot read."""
    (tmp_path / "m").mkdir()
    archive(tmp_path / "m" / "pytorch_model.bin", pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(Refused) as found:
        surgery.open(tmp_path / "m")
    assert "not a pickle of tensors" in str(found.value) and "weights_only" not in str(found.value)
    assert not [w for w in recwarn if "pickle" in str(w.message)]
