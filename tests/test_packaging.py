"""The wheel holds every module of the folders: a package left out of `packages` would vanish from it silently."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_holds_every_module(tmp_path):
    copy = tmp_path / "src"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        source, target = ROOT / name, copy / name
        if name.startswith(("surgery/", "ops/")) or name in ("pyproject.toml", "README.md"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(source.readlink())
            elif source.is_file():
                target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
    folders = {f"surgery/{p.relative_to(ROOT / 'surgery')}" for p in (ROOT / "surgery").rglob("*.py")}
    folders |= {f"surgery/ops/{p.name}" for p in (ROOT / "ops").glob("*.py")}
    assert inside == folders
    assert not any(n.startswith("ops/") for n in inside), "a top-level `ops` would overwrite another project"


def test_importing_ops_from_its_folder_is_refused():
    done = subprocess.run([sys.executable, "-c", "import ops"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "surgery.ops" in done.stderr


def test_import_and_help_do_not_load_torch():
    code = "import sys, surgery; from surgery.cli import cli; cli.main(['--help'], standalone_mode=False); "
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'too much imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout
