"""SIGKILL at every moment that matters: before each single effect that a run has on the disk, and in the middle of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import recipe, trio

STEPS = """
da: {op: diff, of: [a, base]}
db: {op: diff, of: [b, base]}
t: {op: ties, of: [da, db], density: 0.3, trim: global}
out: {op: add, of: [base, t], weight: 0.7}
"""


@pytest.mark.parametrize(("shards", "overwrite", "torn"), [(1, False, True), (3, True, False)])
def test_killed_before_each_effect_on_the_disk(tmp_path: Path, shards: int, overwrite: bool, torn: bool) -> None:
    trio(tmp_path, depth=1, head=False)
    path = recipe(tmp_path, STEPS, output="{from: out}" if shards == 1 else "{from: out, shard_size: 300B}")
    command = [sys.executable, str(Path(__file__).with_name("crash_points.py")), path, int(overwrite), int(torn)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 25, done.stderr  # effects; each was the last one of a run
