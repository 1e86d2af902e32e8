"""All merge methods of the peer against ours: benchmarks/parity.py, where SURGERY_PEER names the peer's Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARITY = Path(__file__).parents[2] / "benchmarks" / "parity.py"
PEER = os.environ.get("SURGERY_PEER")


@pytest.mark.skipif(not PEER, reason="SURGERY_PEER does not name a Python that has mergekit 0.1.5")
def test_every_method_of_the_peer_gives_the_same_numbers() -> None:
    done = subprocess.run([sys.executable, str(PARITY), "--peer", str(PEER)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 methods, 0 off" in done.stdout
