"""Checkpoints where they are: the same plan, tensors and fingerprint as on disk, from headers and ranges alone."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import BF16, bits, llama, read_checkpoint, recipe, same, surgery, write_checkpoint, write_file, write_raw
from server import COMMIT, Fault, Request, Server

import surgery as package
from surgery.checkpoint.source import open_source
from surgery.errors import Failed, Refused
from surgery.remote.mode import streaming


def weights_asked(server: Server) -> list[Request]:
    return [r for r in server.log if r.path.endswith(".safetensors")]


def data_asked(server: Server) -> list[Request]:
    """Requests for more than headers, and for more than a look whether the file is there."""
    return [r for r in weights_asked(server) if r.range not in ((0, (128 << 10) - 1), (0, 0))]


def average(a: str | Path, b: str | Path, out: Path) -> dict[str, np.ndarray]:
    package.ops.average(package.open(str(a)), package.open(str(b))).save(out)
    return read_checkpoint(out)


# -- web servers -----------------------------------------------------------------------------------------------------------


def test_a_folder_and_a_file_on_the_web_merge_as_on_disk(web: Server, tmp_path: Path) -> None:
    a, b = llama(web.folder / "a", 1, shards=3), llama(web.folder / "b", 2)
    here, there = open_source(str(a)), open_source(f"{web.url}/a/")
    assert there.fingerprint == here.fingerprint and there.label == "a" and there.config == here.config
    assert list(there.tensors) == list(here.tensors) and not data_asked(web)
    found = average(f"{web.url}/a/", f"{web.url}/b/model.safetensors", tmp_path / "out")
    same(found, average(a, b, tmp_path / "expected"))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    assert not [r for r in data_asked(web) if r.range is None]


def test_an_index_by_its_url_and_a_header_longer_than_the_first_range(web: Server) -> None:
    tensors = {f"{'x' * 120}.{i}": np.full(2, i, np.float32) for i in range(2000)}
    write_checkpoint(web.folder / "m", tensors, shards=2)
    found = package.open(f"{web.url}/m/model.safetensors.index.json")
    assert len(found) == 2000 and found[f"{'x' * 120}.77"].compute().tolist() == [77, 77]


def test_headers_of_many_shards_in_one_round(web: Server) -> None:
    tensors = {f"t{i}": np.full(3, i, np.float32) for i in range(60)}
    write_checkpoint(web.folder / "m", tensors, shards=60)
    web.latency = 0.05
    found = open_source(f"{web.url}/m/")
    assert len(found.tensors) == 60 and web.most_busy >= 16
    assert len(weights_asked(web)) == 61  # and model.safetensors, which is not there


def test_what_needs_files_here_says_so(web: Server, tmp_path: Path) -> None:
    a, b = llama(web.folder / "a", 1), llama(web.folder / "b", 2)
    done = surgery("delta", "pack", "--model", f"{web.url}/b/", "--base", f"{web.url}/a/", "-o", tmp_path / "x.delta.safetensors")
    assert done.returncode == 2 and "this needs the file on this machine" in done.stderr and "Traceback" not in done.stderr
    assert surgery("diff", f"{web.url}/a/", a).returncode == 0 and b.is_dir()


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    done = surgery("inspect", "http://127.0.0.1:9/model.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and "model.safetensors: its host does not accept connections" in done.stderr


def test_queries_and_passwords_are_used_and_not_repeated(web: Server, tmp_path: Path) -> None:
    llama(web.folder / "a", 1)
    source = open_source(web.url.replace("//", "//me:s3cret@") + "/a/model.safetensors?sig=hidden")
    assert source.location == f"{web.url}/a/model.safetensors" == next(iter(source.files))
    assert all(r.query == "sig=hidden" and "Authorization" in r.headers for r in weights_asked(web))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nothing/", "has neither model.safetensors nor model.safetensors.index.json"),
        ("/nothing/model.safetensors", "not there (404"),
        ("/both/", "holds both"),
        ("/escape/", "points outside its directory"),
        ("/page/", "not an index file"),
        ("/broken/", "overlaps the tensor before it"),
        ("/tiny/", "too short for a safetensors header"),
        ("/huge/", "declares a header of"),
        ("/part/", "model-00002-of-00002.safetensors: not there"),
        ("/pickled/pytorch_model.bin", "only safetensors files"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(web: Server, path: str, said: str) -> None:
    llama(web.folder / "both", 1, shards=2)
    write_file(web.folder / "both" / "model.safetensors", {"x": np.zeros(1, np.float32)})
    for name in ("escape", "page", "broken", "tiny", "huge"):
        (web.folder / name).mkdir()
    (web.folder / "escape/model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret.safetensors"}}')
    (web.folder / "page/model.safetensors.index.json").write_text("<html>log in</html>")
    entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": [a, a + 8]} for n, a in (("x", 0), ("y", 4))}
    write_raw(web.folder / "broken/model.safetensors", entries, bytes(12))
    (web.folder / "tiny/model.safetensors").write_bytes(b"abc")
    (web.folder / "huge/model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + bytes(100))
    llama(web.folder / "part", 1, shards=2)
    (web.folder / "part/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Refused) as found:
        open_source(web.url + path)
    assert said in found.value.message and "\n" not in found.value.message


def test_unknown_schemes_and_missing_libraries_are_refused() -> None:
    with pytest.raises(Refused, match="ftp:// is not known"):
        open_source("ftp://host/model")
    with pytest.raises(Refused, match="gs:// needs the package gcsfs"):
        open_source("gs://bucket/model")
    with pytest.raises(Refused, match="not a model of the hub"):
        open_source("hf://just-a-name")


def test_a_merge_survives_what_networks_do(web: Server, tmp_path: Path) -> None:
    """Every third answer fails in one of five ways; the bytes are the same."""
    rng = np.random.default_rng(0)
    for name in "ab":
        write_checkpoint(web.folder / name, {f"t{i}": rng.standard_normal((400, 500)).astype(BF16) for i in range(8)}, shards=4)
    faults = [Fault(status=429), Fault(status=500), Fault(cut=70_000), Fault(cut=0), Fault(status=503)]
    lock, count = threading.Lock(), 0

    def every_third(request: Request) -> Fault | None:
        nonlocal count
        if not request.path.endswith(".safetensors"):
            return None
        with lock:
            count += 1
            return faults[count // 3 % 5] if count % 3 == 0 else None

    web.faults.append(every_third)
    found = average(f"{web.url}/a/", f"{web.url}/b/", tmp_path / "out")
    assert count > 20
    same(found, average(web.folder / "a", web.folder / "b", tmp_path / "expected"))


def test_a_change_during_a_run_fails_it_and_the_rest_can_be_resumed(
    web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = llama(web.folder / "a", 1, shards=3), llama(web.folder / "b", 2)
    merged = package.ops.average(package.open(f"{web.url}/a/"), package.open(f"{web.url}/b/"))
    last = a / "model-00003-of-00003.safetensors"
    kept = last.read_bytes()
    last.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(Failed, match=r"00003-of-00003.safetensors: changed since it was opened"):
        merged.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    last.write_bytes(kept)
    merged.save(tmp_path / "out", resume=True)
    same(read_checkpoint(tmp_path / "out"), average(a, b, tmp_path / "expected"))


def test_one_tensor_is_computed_from_its_own_bytes(web: Server) -> None:
    rng = np.random.default_rng(3)
    tensors = {f"t{i}": rng.standard_normal((3000, 1000)).astype(np.float32) for i in range(4)}  # 12 MB each
    write_checkpoint(web.folder / "m", tensors)
    found = package.open(f"{web.url}/m/")
    assert bits(found["t2"].compute().numpy()) == bits(tensors["t2"])
    assert sum(b - a + 1 for r in data_asked(web) if r.range for a, b in [r.range] if b) <= 12_000_000 + 2 * (4 << 20)


def test_damage_on_the_way_is_seen_where_digests_are_known(web: Server, tmp_path: Path) -> None:
    """Outputs of ours carry digests; what is read of them is hashed as it is used, wherever it comes from."""
    a, b = (package.open(str(llama(tmp_path / name, seed))) for seed, name in enumerate("ab"))
    package.ops.average(a, b).save(web.folder / "ours")
    path = web.folder / "ours/model.safetensors"
    kept = path.read_bytes()
    package.ops.average(package.open(f"{web.url}/ours/"), a).save(tmp_path / "sound")
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(Refused, match="do not match the digest"):
        package.ops.average(package.open(f"{web.url}/ours/"), a).save(tmp_path / "out")


# -- the hub ---------------------------------------------------------------------------------------------------------------


def test_a_hub_model_is_opened_without_its_weights(hub: Server, tmp_path: Path) -> None:
    a = llama(hub.folder / "org/a", 1, shards=3)
    for location in ("hf://org/a", "hf://org/a@main", f"hf://org/a@{COMMIT}"):
        found = open_source(location)
        assert found.fingerprint == open_source(str(a)).fingerprint and found.revision == COMMIT
        assert found.location == location.removeprefix("hf://") and found.config is not None
    with streaming():
        assert open_source("org/a").files == found.files
    assert not data_asked(hub) and not list((tmp_path / "cache").rglob("*.safetensors"))
    assert next(iter(found.files)) == f"hf://org/a@{COMMIT}/model-00001-of-00003.safetensors"
    found = package.open("hf://org/a")["model.norm.weight"].compute()
    assert found.float().numpy().tolist() == read_checkpoint(a)["model.norm.weight"].astype(np.float32).tolist()


def test_without_streaming_it_is_downloaded_as_before(hub: Server, tmp_path: Path) -> None:
    a = llama(hub.folder / "org/a", 1, shards=3)
    found = open_source("org/a")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3 and found.fingerprint == open_source(str(a)).fingerprint


def test_the_environment_can_say_so(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(hub.folder / "org/a", 1)
    monkeypatch.setenv("SURGERY_STREAM", "1")
    assert next(iter(open_source("org/a").files)).startswith("hf://")
    monkeypatch.setenv("SURGERY_STREAM", "0")
    assert next(iter(open_source("org/a").files)).startswith("/")


def test_pickles_are_downloaded_even_so(hub: Server) -> None:
    import torch

    folder = hub.folder / "org/old"
    folder.mkdir(parents=True)
    torch.save({"w": torch.arange(6.0)}, folder / "pytorch_model.bin")
    found = package.open("hf://org/old")
    assert found["w"].compute().tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_in_the_cache_is_not_asked_for(hub: Server) -> None:
    llama(hub.folder / "org/a", 1, shards=3)
    open_source("org/a")
    hub.log.clear()
    found = open_source("hf://org/a")
    assert all(path.startswith("/") for path in found.files) and not weights_asked(hub)


def test_a_cached_model_streams_offline(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(hub.folder / "org/a", 1)
    open_source("org/a")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert open_source("hf://org/a").revision == COMMIT and not hub.log
    with pytest.raises(Refused, match="not in the hub cache, and the hub cannot be reached"):
        open_source("hf://org/b")


def test_the_token_goes_to_the_hub_and_no_further(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(hub.folder / "org/a", 1)
    hub.token = "hf_secret"
    with pytest.raises(Refused, match="the hub refused") as found:
        open_source("hf://org/a")
    assert "hf auth login" in (found.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    open_source("hf://org/a")
    assert weights_asked(hub)
    for request in weights_asked(hub):
        assert ("Authorization" in request.headers) == (not request.path.startswith("/cdn/"))


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("hf://org/none", "no such model on the hub"),
        ("hf://org/a@v9", "knows the model but not this revision"),
        ("hf://org/part", "has no model-00002-of-00002.safetensors; its index names it"),
        ("hf://org/empty", "no weights in it (found config.json)"),
        ("hf://org/gated", "refuses it (403"),
    ],
)
def test_what_the_hub_has_not_is_refused(hub: Server, location: str, said: str) -> None:
    llama(hub.folder / "org/a", 1)
    llama(hub.folder / "org/gated", 1)
    llama(hub.folder / "org/part", 1, shards=2)
    (hub.folder / "org/part/model-00002-of-00002.safetensors").unlink()
    (hub.folder / "org/empty").mkdir()
    (hub.folder / "org/empty/config.json").write_text("{}")
    hub.faults.append(lambda r: Fault(status=403) if "gated/resolve" in r.path and r.path.endswith("tensors") else None)
    with pytest.raises(Refused) as found:
        open_source(location)
    assert said in found.value.message


def test_a_busy_hub_is_asked_again(hub: Server) -> None:
    llama(hub.folder / "org/a", 1)
    hub.faults.append(lambda r: Fault(status=503) if r.number == 0 else None)
    assert open_source("hf://org/a").revision == COMMIT


def test_plan_and_run_by_the_command_line(tmp_path: Path) -> None:
    """`plan` downloads no weights, `run --stream` neither; `run` does; all with the endpoint of the environment."""
    import os

    for seed, name in enumerate(("a", "b")):
        llama(tmp_path / "hub/org" / name, seed, shards=2)
    recipe(tmp_path, "m: {op: average, of: [a, b]}", models=(), output="{from: m}")
    text = (tmp_path / "recipe.yaml").read_text().replace("models:\n", "models:\n  a: org/a\n  b: org/b@main\n")
    (tmp_path / "recipe.yaml").write_text(text)
    with Server(tmp_path / "hub") as server:
        env = {k: v for k, v in os.environ.items() if k not in ("TRANSFORMERS_OFFLINE", "HF_TOKEN")}
        env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        cached = lambda: len(list((tmp_path / "home").rglob("*.safetensors")))  # noqa: E731
        planned = surgery("plan", "recipe.yaml", cwd=tmp_path, env=env)
        assert planned.returncode == 0 and "INPUT a: 12 tensors" in planned.stdout, planned.stderr
        assert cached() == 0 and not data_asked(server)
        streamed = surgery("run", "recipe.yaml", "-o", "streamed", "--stream", "-q", cwd=tmp_path, env=env)
        assert streamed.returncode == 0 and cached() == 0 and data_asked(server), streamed.stderr
        downloaded = surgery("run", "recipe.yaml", "-o", "downloaded", "-q", cwd=tmp_path, env=env)
        assert downloaded.returncode == 0 and cached() == 4, downloaded.stderr
    same(read_checkpoint(tmp_path / "streamed"), read_checkpoint(tmp_path / "downloaded"))


# -- object stores ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def store():
    """fsspec's store in memory: (its files, the URL of its folder)."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_an_object_store_by_way_of_fsspec(store, tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 1, shards=3), llama(tmp_path / "b", 2)
    for folder in (a, b):
        for file in folder.iterdir():
            store.pipe_file(f"/bucket/{folder.name}/{file.name}", file.read_bytes())
    there = open_source("memory://bucket/a")
    assert there.fingerprint == open_source(str(a)).fingerprint and there.config == open_source(str(a)).config
    found = average("memory://bucket/a/", "memory://bucket/b/model.safetensors", tmp_path / "out")
    same(found, average(a, b, tmp_path / "expected"))
    with pytest.raises(Refused, match="bucket/none: not there"):
        open_source("memory://bucket/none")
    merged = package.ops.average(package.open("memory://bucket/a"), package.open("memory://bucket/b"))
    store.pipe_file("/bucket/b/model.safetensors", (b / "model.safetensors").read_bytes())
    with pytest.raises(Failed, match=r"b/model.safetensors: changed since it was opened"):
        merged.save(tmp_path / "other")


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server, where it and s3fs are installed."""
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    a, b = llama(tmp_path / "a", 1, shards=3), llama(tmp_path / "b", 2)
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        fs.mkdir("bucket")
        for folder in (a, b):
            fs.put(f"{folder}/", f"bucket/{folder.name}/", recursive=True)
        merged = package.ops.average(package.open("s3://bucket/a/"), package.open("s3://bucket/b"))
        merged.save(tmp_path / "out")
        same(read_checkpoint(tmp_path / "out"), average(a, b, tmp_path / "expected"))
        fs.pipe_file("bucket/b/model.safetensors", (b / "model.safetensors").read_bytes() + b"1")
        with pytest.raises(Failed, match="changed since it was opened"):
            merged.save(tmp_path / "other")
        with pytest.raises(Refused, match="not there"):
            open_source("s3://bucket/none")
    finally:
        server.stop()
