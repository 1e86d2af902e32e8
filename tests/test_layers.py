"""Which package may import which: lower layers never know of higher ones. Imports inside functions count too."""

import ast
from pathlib import Path

import pytest

import surgery

ROOT = Path(surgery.__file__).parent
BELOW = {
    "errors": set(),
    "ops": set(),
    "remote": set(),
    "checkpoint": {"remote", "errors"},
    "graph": {"checkpoint", "ops", "errors"},
    "engine": {"remote", "graph", "checkpoint", "ops", "errors", "version"},
    "adapter": {"engine", "graph", "checkpoint", "ops", "errors", "version"},
    "delta": {"statistics", "engine", "graph", "checkpoint", "ops", "errors", "version"},
    "analysis": {"engine", "graph", "checkpoint", "ops", "errors"},
    "report": {"errors", "version"},
    "vocabulary": {"engine", "graph", "checkpoint", "ops", "errors"},
    "statistics": {"graph", "checkpoint", "errors", "version"},
    "reshape": {"statistics", "live", "engine", "graph", "checkpoint", "ops", "errors"},
    "gguf": {"graph", "checkpoint", "errors"},
    "inputs": {"adapter", "delta", "gguf", "statistics", "graph", "checkpoint", "errors"},
    "steps": {"adapter", "delta", "reshape", "graph", "errors"},
    "tuning": {"lab", "adapter", "delta", "inputs", "engine", "graph", "checkpoint", "ops", "errors", "version"},
    "lab": {"recipe", "statistics", "inputs", "engine", "graph", "checkpoint", "ops", "errors", "version", "live", "api"},
    "recipe": {"inputs", "steps", "vocabulary", "engine", "graph", "checkpoint", "ops", "errors"},
    "cluster": {"recipe", "remote", "engine", "graph", "checkpoint", "errors", "version"},
    "device": {"engine", "graph", "checkpoint", "ops", "errors"},
    "api": {"cluster", "device", "remote", "live", "recipe", "inputs", "vocabulary", "engine", "graph", "checkpoint", "ops", "errors"},
}


def imports(file: Path, package: str) -> set[tuple[str, int]]:
    """(dotted name, line) of every module that `file` imports, relative imports resolved against `package`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            prefix = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (prefix, node.module)))
            if module == "surgery":  # `from surgery import x`: x is the module, or a name of the package
                found |= {(f"surgery.{alias.name}", node.lineno) for alias in node.names}
            else:
                found.add((module, node.lineno))
    return found


def package_of(file: Path) -> str:
    return ".".join(("surgery", *file.relative_to(ROOT).parent.parts))


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_only_lower_ones(layer: str) -> None:
    home = ROOT / layer
    files = sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
    assert files
    wrong = []
    for file in files:
        for name, line in sorted(imports(file, package_of(file))):
            parts = name.split(".")
            if parts[0] == "surgery" and (parts[1] if len(parts) > 1 else "") not in BELOW[layer] | {layer}:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_relative_and_plain_imports_are_both_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import surgery.cli\nfrom ..engine import run\nfrom . import y\nfrom surgery import api\n")
    names = {name for name, _ in imports(file, "surgery.graph")}
    assert names == {"surgery.cli", "surgery.engine", "surgery.graph", "surgery.api"}
