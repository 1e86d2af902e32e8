"""Hub ids, resolved from a cache on disk: offline is honoured, revisions are found, absences are explained."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A hub cache that holds org/model at `main`."""
    repo = tmp_path / "hub" / "models--org--model"
    snapshot = repo / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    save_file({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "x"}))
    return tmp_path / "hub"


def opened(cache, source):
    """What `surgery.open` says in a process of its own, since the hub library reads its settings at import."""
    code = (
        "import sys, surgery\n"
        "try:\n"
        "    c = surgery.open(sys.argv[1]); print(list(c), c.node.source.revision, c['w'].compute().sum().item())\n"
        "except surgery.Refused as e:\n"
        "    print('REFUSED', e)\n"
    )
    env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, source], env=env, capture_output=True, text=True, cwd=cache)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("source", ["org/model", "org/model@main", f"org/model@{SHA}"])
def test_cached_model_opens_offline(cache, source):
    assert opened(cache, source).split() == ["['w']", SHA, "15.0"]


def test_uncached_model_is_refused_with_a_way_on(cache):
    said = opened(cache, "org/other")
    assert said.startswith("REFUSED org/other") and "hf download" in said


def test_unknown_revision_is_refused(cache):
    assert opened(cache, "org/model@v9").startswith("REFUSED org/model")
