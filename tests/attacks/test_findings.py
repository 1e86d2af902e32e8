"""What the fuzzer found (`benchmarks/fuzz.py`), and its seeds: every target refuses or reads them, in a process that lives on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parents[1] / "benchmarks"
FINDINGS = sorted((HERE / "findings").iterdir())
TARGETS = ("header", "index", "document", "recipe", "manifest", "package", "pickled")
_SCRIPT = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzz_targets
from surgery.errors import SurgeryError
with tempfile.TemporaryDirectory() as folder:
    call, seeds = fuzz_targets.TARGETS[sys.argv[2]](Path(folder).resolve())
    for path in sys.argv[3:]:
        try:
            call(Path(path).read_bytes())
            sys.exit(f"{path} was taken")
        except SurgeryError as problem:
            print(problem)
    for seed in seeds:
        try:
            call(seed)
        except SurgeryError:
            pass
"""


@pytest.mark.parametrize("target", TARGETS)
def test_findings_are_refused_and_seeds_do_no_harm(target: str) -> None:
    """In a process of its own: one of the findings ended the interpreter."""
    mine = [str(path) for path in FINDINGS if path.name.startswith(f"{target}-")]
    done = subprocess.run([sys.executable, "-c", _SCRIPT, str(BENCHMARKS), target, *mine], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("hint:") <= len(mine) <= done.stdout.count("\n") or not mine


def test_every_finding_belongs_to_a_target() -> None:
    assert len(FINDINGS) >= 4 and all(path.name.split("-")[0] in TARGETS for path in FINDINGS)
