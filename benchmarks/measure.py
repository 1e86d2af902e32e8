"""Measure whole processes: wall time, peak memory, and the state of the machine they start from.

This module imports the standard library alone, and so must everything that measures with it. A child's
peak RSS as the kernel counts it is never below that of the process that started it (the address space
before `exec` counts), so a measuring process that held torch would report its own size as the child's.
For the same reason models are generated in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".bench"
"""Where models and outputs go unless told otherwise: git ignores it."""

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_SPARE_KB = 400_000
_STEP = 8 << 20


@dataclass(frozen=True)
class Run:
    """One process, from start to exit. `peak_mb` is that of its largest process, children included."""

    seconds: float
    peak_mb: float
    code: int
    log: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def reason(self) -> str:
        """Return the last line it said, for the report of a failure."""
        lines = [line for line in self.log.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self.code}"

    def record(self) -> dict[str, object]:
        """Return what is worth keeping: the log of a failure alone."""
        return {**vars(self), "log": None if self.ok else self.log}


def measure(argv: Sequence[str | Path], *, timeout: float = 3600) -> Run:
    """Run a command and return its wall time, peak RSS (`ru_maxrss` of `os.wait4`) and what it said.

    Output goes to a temporary file, so a chatty child never waits for us. Hub clients are told
    that there is no network. A child that outlasts `timeout` seconds is killed and counts as failed.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(part) for part in argv]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        alarm = threading.Timer(timeout, child.kill)
        alarm.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        finally:
            alarm.cancel()
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read().decode(errors="replace").replace("\r", "\n")
    return Run(seconds, usage.ru_maxrss * _RSS_UNIT / 1e6, child.returncode, text)


def median(runs: Iterable[Run], field: str = "seconds") -> float | None:
    """Return the median of a field over the runs that succeeded, None where none did."""
    values = [getattr(run, field) for run in runs if run.ok]
    return statistics.median(values) if values else None


def weights(*folders: Path) -> list[Path]:
    """Return the weight files of some checkpoints, in reading order."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def floor_command(inputs: Sequence[Path], like: Path, out: Path) -> list[str]:
    """Return the command no merge can beat: read every input byte once, write one output's worth.

    `like` is a checkpoint of the output's size; it is copied to the new file `out`.
    """
    read = shlex.join(["cat", *map(str, weights(*inputs))])
    write = shlex.join(["cat", *map(str, weights(like))])
    return ["sh", "-c", f"{read} > /dev/null && {write} > {shlex.quote(str(out))}"]


def warm(files: Iterable[Path]) -> None:
    """Read files into the page cache, twice: the second read marks their pages as worth keeping."""
    names = [str(file) for file in files]
    for _ in range(2):
        subprocess.run(["cat", *names], stdout=subprocess.DEVNULL, check=True)


def remove(path: Path) -> None:
    """Delete a file or a directory if it is there, and let what is still being written reach the disk."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()


class Memory:
    """Keep free memory full of disposable page cache, as on a machine that has been up for days.

    Many virtual machines hand free pages back to their host after a second or two. Touching such a page
    again costs seconds per gigabyte, ten times the price of copying it, and it falls on whoever runs next:
    the same `cat` takes 0.7 s or 6 s. Pages of the page cache stay, and are recycled at no such cost.
    `fill` therefore reads on through a sparse file (holes: no disk is read) until little memory is free.
    """

    def __init__(self, folder: Path, when: str = "auto"):
        balloon = any(Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*"))
        self.on = _free_kb() is not None and (when == "yes" or (when == "auto" and balloon))
        self.path, self.at, self.size = folder / "filler", 0, 0

    def __enter__(self) -> Memory:
        if self.on:
            self.size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _STEP * _STEP
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            os.truncate(self.path, self.size)
        return self

    def __exit__(self, *_):
        if self.on:
            self.path.unlink(missing_ok=True)

    def fill(self) -> None:
        """Read until little memory is free, for one length of memory at most."""
        if not self.on:
            return
        buffer = bytearray(_STEP)
        with open(self.path, "rb", buffering=0) as file:
            for _ in range(self.size // _STEP // 2):
                if (_free_kb() or 0) < _SPARE_KB:
                    return
                os.preadv(file.fileno(), [buffer], self.at)
                self.at = (self.at + _STEP) % self.size


def _free_kb() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("MemFree:")), None)


def console_script(name: str = "surgery") -> Path | None:
    """Return the console script that was installed next to the Python that runs this, if there is one."""
    script = Path(sys.executable).parent / name
    return script if script.exists() else None


def peer_script(where: str) -> Path:
    """Return mergekit's command, given its environment's Python, bin directory or root."""
    path = Path(where)
    places = [path.parent, path, path / "bin"]
    for place in places:
        if (place / "mergekit-yaml").exists():
            return place / "mergekit-yaml"
    raise SystemExit(f"no mergekit-yaml beside {where}: name the Python of an environment that has mergekit")


def generate(kind: str, out: Path, *args: str, last: str = "") -> None:
    """Make models with models.py in a process of its own, unless they are there: `last` is made last."""
    if not (out / last).exists():
        say(f"making {kind} {' '.join(args)} in {out}")
        subprocess.run([sys.executable, HERE / "models.py", kind, out, *args], check=True)


def family(out: Path, size: str, tuned: int) -> None:
    """Make a base and its fine-tunes of a size of models.py, unless they are there."""
    generate("family", out, "--size", size, "--tuned", str(tuned), last=f"ft{tuned - 1}")


def say(text: str) -> None:
    """Report progress on stderr: stdout carries the table alone."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns: text to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in pairs)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def figure(value: float | None, form: str = ".2f") -> str:
    """Return a number as text, and '-' for one that was not measured."""
    return "-" if value is None else format(value, form)


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b where both were measured."""
    return a / b if a is not None and b else None


def machine() -> dict[str, object]:
    """Return what the figures depend on and a reader cannot see: cores, memory, system, Python."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "system": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}",
        "python": sys.version.split()[0],
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every script here has."""
    ours = console_script()
    parser.add_argument("--surgery", type=Path, default=ours, help="our command [the one beside this Python]")
    parser.add_argument("--work", type=Path, default=WORK / "work", help="directory for recipes and outputs")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--json", type=Path, help="write every single measurement here")


def publish(args: argparse.Namespace, text: str, record: dict[str, object]) -> None:
    """Print the table, and write it and the record where asked."""
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")
