"""Operators: pure functions on tensors, one family per file. Imported as `surgery.ops`."""

if __name__ != "surgery.ops":
    raise ImportError("import `surgery.ops`; the folder `ops/` is part of the package `surgery` (see pyproject.toml)")
