"""`surgery push`, the command in a process of its own, to a hub on this machine: what arrives, and what a kill costs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import SURGERY, all_bytes, llama
from hub_server import Hub

import surgery


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished output of ours in several shards."""
    a, b = (surgery.open(str(llama(tmp_path / name, i))) for i, name in enumerate("ab"))
    surgery.ops.average(a, b).save(tmp_path / "out", shard_size="500B")
    return tmp_path / "out"


def environment(hub: Hub, home: Path) -> dict[str, str]:
    more = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **more}


def push(hub: Hub, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*SURGERY, "push", str(out), "org/name", *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment(hub, out.parent / "home"))


def test_a_push_that_was_killed_goes_on_where_it_was(out: Path) -> None:
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    with Hub() as hub:
        reached, over = threading.Event(), threading.Event()

        def hold(oid: str) -> None:
            if len(hub.objects):
                reached.set()
                over.wait(60)
                raise ConnectionAbortedError  # whoever sent this is gone

        hub.before_put = hold
        process = subprocess.Popen(
            [*SURGERY, "push", str(out), "org/name", "--private"], env=environment(hub, out.parent / "home"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert reached.wait(60)
        process.kill()
        process.wait()
        over.set()
        done = set(hub.objects)
        assert done and not hub.files  # nothing is published before all is there
        hub.before_put, hub.puts = lambda oid: None, []
        again = push(hub, out)
        assert again.returncode == 0, again.stderr
        wanted = {hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}
        assert set(hub.puts) == wanted - done  # a set: one that the killed process began may be counted late
        assert hub.files == all_bytes(out) and hub.is_private("org/name")
        assert again.stdout.strip() == f"{hub.url}/org/name"
        hub.puts = []
        once_more = push(hub, out, "--message", "Again")
        assert once_more.returncode == 0 and not hub.puts and "Traceback" not in once_more.stderr


@pytest.mark.parametrize(("fault", "code", "said"), [(403, 2, "does not let you write there"), (400, 1, "the hub answers 400")])
def test_a_hub_that_refuses(out: Path, monkeypatch: pytest.MonkeyPatch, fault: int, code: int, said: str) -> None:
    from hub_server import _Handler

    def refuse(self: Any) -> None:
        self._body()
        self._answer({"error": "no"}, fault)

    with Hub() as hub:
        monkeypatch.setattr(_Handler, "do_PUT", refuse)
        done = push(hub, out)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr and not hub.files
