"""What every operator must declare, and what holds for every operator whatever it computes."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import surgery.ops as ops
from surgery.ops.declare import REQUIRED, SECTIONS, Op, Param, Registry, linear, registry, takes
from surgery.ops.eager import apply_to_tensors

HERE = Path(ops.__file__).parent
NAMES = set(registry)
REQUIRED_VALUES: dict[str, dict[str, Any]] = {
    "lerp": {"alpha": 0.3},
    "lm_cocktail": {"loss": 1.5},
    "lines": {"alpha": 0.3},
    "scale": {"by": -0.5},
    "nearswap": {"t": 0.3},
    "slerp": {"t": 0.3},
    "stitch": {"rules": {"*": "a"}},
}
COMPUTING = sorted(NAMES - {"stitch", "regmean"})  # regmean: inputs of different shapes, see its own file
EVERY = pytest.mark.parametrize("name", sorted(NAMES))
EVERY_COMPUTING = pytest.mark.parametrize("name", COMPUTING)
EVERY_PARAM = pytest.mark.parametrize(
    ("name", "param"), [(op.name, p) for op in registry.values() for p in op.params], ids=lambda v: getattr(v, "name", v)
)


def some(op: Op, shape: tuple[int, ...] = (4, 3), dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """As many inputs as `op` takes at least."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(op.takes.at_least)]


def decorated(file: Path) -> set[str]:
    """Names of the operators declared in a file, by its syntax."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("linear", "pointwise"):
                found.add(call.args[0].value)
    return found


def test_the_registry_is_complete() -> None:
    assert set(registry) == NAMES == set().union(*map(decorated, HERE.glob("*.py")))
    for name, op in registry.items():
        assert op.name == name and ops.get(name) is op
        assert getattr(ops, name) is op
    assert ops.get("nonsense") is None
    assert ops.pass_ is registry["pass"]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ops.nonsense


def test_a_name_is_registered_once() -> None:
    mine, op = Registry(), registry["scale"]
    mine.add(op)
    with pytest.raises(ValueError, match="scale"):
        mine.add(op)
    assert mine.add(op, replace=True) is op
    with pytest.raises(ValueError, match="add"):
        linear("add", takes=takes("x", space="same"), gives="first")(lambda count: [1.0])


GIVEN = ("largest", "eps", "tol", "max_iter", "seed", "k", "loss", "floor", "clamp", "ridge", "steps", "rate")
"""Numbers that say how precisely, how much of what, or for which data; coefficients are the rest, and have presets."""


@EVERY
def test_documentation(name: str) -> None:
    op = registry[name]
    assert op.summary and len(op.summary) < 100 and not op.summary.endswith(".")
    tuned = [p.name for p in op.params if p.kind in ("number", "integer") and p.name not in GIVEN]
    wanted = tuple(t for t in SECTIONS if t != "Presets" or tuned or op.section(t))
    for title in wanted:
        text = op.section(title)
        assert text, f"{name} has no {title}: {tuned}"
        assert not any(line.strip().rstrip(":") in SECTIONS for line in text.splitlines())
    order = [line.strip()[:-1] for line in op.doc.splitlines() if line.strip()[:-1] in SECTIONS and line.strip()[-1:] == ":"]
    assert tuple(order) == wanted
    evidence = " ".join(op.section("Evidence").split())
    assert name == "pass" or re.match("For: .+ Against: .+", evidence), evidence


@EVERY
def test_the_example_is_a_valid_step(name: str) -> None:
    op = registry[name]
    ((_, step),) = yaml.safe_load(op.section("Example")).items()
    inputs = step.pop("of")
    assert step.pop("op") == name
    assert op.takes.at_least <= (len(inputs) if isinstance(inputs, list) else 1) <= op.takes.at_most
    op.complete(step)


@EVERY
def test_inputs_and_result_are_declared(name: str) -> None:
    op = registry[name]
    assert op.gives in ("weights", "delta", "first")
    spaces = {op.takes.space_of(i) for i in range(5)}
    assert spaces <= {"weights", "delta", "same", "mask"}
    assert 1 <= op.takes.at_least <= op.takes.at_most
    assert all(n in op.takes.text for n in op.takes.names)
    assert op.locality in ("elementwise", "rows", "matrix")
    assert op.needs <= {"depth", "key", "at"}


@EVERY_PARAM
def test_every_parameter_is_documented(name: str, param: Param) -> None:
    assert param.doc.endswith(".") and len(param.doc) > 10
    assert param.kind in ("number", "integer", "boolean", "choice", "rules")
    assert param.range
    for bound in (param.low, param.high):
        assert not math.isfinite(bound) or f"{bound:g}" in param.range
    assert all(word in param.range for word in (*param.choices, *param.words))
    assert param.low < param.high
    assert param.default is REQUIRED or param.problem(param.default) is None
    assert (param.default is REQUIRED) == (param.name in REQUIRED_VALUES.get(name, {}))


def bad_values(param: Param) -> list[Any]:
    if param.kind == "boolean":
        return [0, "yes", 1.0, [True]]
    if param.kind == "choice":
        return ["nonsense", 3, True, ["sum"]]
    if param.kind == "rules":
        return [{}, "a", [1], {1: "a"}]
    wrong: list[Any] = ["nonsense", True, math.nan, math.inf, -math.inf, 1j, {"a": 1.0}, 10**400]
    if param.kind == "integer":
        wrong.append(0.5)
    if param.low > -math.inf:
        wrong += [param.low - 1, *([param.low] if param.above else [])]
    if param.high < math.inf:
        wrong.append(param.high + 1)
    return wrong


@EVERY_PARAM
def test_wrong_values_are_refused_by_name(name: str, param: Param) -> None:
    op = registry[name]
    for value in bad_values(param):
        with pytest.raises(ValueError, match=f"`{param.name}`"):
            op(*some(op), **{**REQUIRED_VALUES.get(name, {}), param.name: value})


@EVERY_PARAM
def test_limits_themselves_are_accepted(name: str, param: Param) -> None:
    limits = [v for v in (param.low, param.high) if math.isfinite(v) and not (param.above and v == param.low)]
    for value in (*limits, *param.words, *param.choices):
        assert param.problem(value) is None


@EVERY
def test_unknown_and_missing_parameters(name: str) -> None:
    op, given = registry[name], REQUIRED_VALUES.get(name, {})
    with pytest.raises(ValueError, match="nonsense"):
        op(*some(op), nonsense=1, **given)
    for missing in given:
        with pytest.raises(ValueError, match=f"`{missing}`"):
            op(*some(op), **{k: v for k, v in given.items() if k != missing})


@EVERY
def test_wrong_inputs(name: str) -> None:
    op, given = registry[name], REQUIRED_VALUES.get(name, {})
    with pytest.raises(ValueError, match=name):
        op(*some(op)[:-1], **given)
    if op.takes.at_most < math.inf:
        with pytest.raises(ValueError, match=name):
            op(*[torch.zeros(2)] * (int(op.takes.at_most) + 1), **given)
    if op.takes.at_least > 1:
        with pytest.raises(ValueError, match="shape"):
            op(*some(op)[:-1], torch.zeros(5, 3), **given)


@pytest.mark.parametrize("name", [op.name for op in registry.values() if any(p.per_input for p in op.params)])
def test_one_value_per_input(name: str) -> None:
    op = registry[name]
    inputs = some(op)
    for param in (p for p in op.params if p.per_input):
        wanted = op.takes.models(len(inputs)) - param.first_input
        plain = op(*inputs, **{param.name: 0.5})
        assert torch.equal(plain, op(*inputs, **{param.name: [0.5] * wanted}))
        assert torch.equal(plain, op(inputs, **{param.name: (0.5,) * wanted}))
        for wrong in ([], [0.5] * (wanted + 1)):
            with pytest.raises(ValueError, match=f"`{param.name}`"):
                op(*inputs, **{param.name: wrong})
        with pytest.raises(ValueError, match=f"`{param.name}`"):
            op(*inputs, **{param.name: ["x"] * wanted})


@EVERY_COMPUTING
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (5, 3), (0, 4), (4, 0), (2, 3, 4), (4, 3, 3, 3)])
def test_shape_dtype_and_untouched_inputs(name: str, shape: tuple[int, ...]) -> None:
    op, given = registry[name], REQUIRED_VALUES.get(name, {})
    variants = [{}] + [{p.name: c} for p in op.params for c in p.choices]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for variant in variants:
            inputs = some(op, shape, dtype)
            before = [x.clone() for x in inputs]
            made = op(*inputs, **given, **variant)
            assert made.shape == shape
            assert made.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
            made.fill_(99.0)  # nor do they share memory with the result
            assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), (variant, dtype)


@pytest.mark.parametrize("name", [op.name for op in registry.values() if op.param("density")])
def test_density_one_shares_no_memory(name: str) -> None:
    op = registry[name]
    x = torch.ones(4)
    op(x, density=1.0).zero_()
    assert torch.equal(x, torch.ones(4))


@EVERY_COMPUTING
def test_whole_numbers_do(name: str) -> None:
    """1 means what 1.0 means, for people who write `weight=1`."""
    op = registry[name]
    inputs = some(op)
    for value in (0, 1, -1, 2):
        params = {p.name: value for p in op.params if p.kind == "number" and p.problem(value) is None}
        if any(p.default is REQUIRED and p.name not in params for p in op.params):
            continue
        if name in ("average", "fisher", "karcher", "multislerp", "nuslerp", "nuslerp_columns") and value == 0:
            continue
        exact = {k: float(v) for k, v in params.items()}
        assert torch.equal(op(*inputs, **params), op(*inputs, **exact))


@EVERY_COMPUTING
def test_memory_layout_and_gradients_do_not_matter(name: str) -> None:
    op, given = registry[name], REQUIRED_VALUES.get(name, {})
    inputs = some(op, (6, 5))
    expected = op(*inputs, **given)
    strided = [torch.stack([x, x], 2).permute(2, 0, 1)[0].T.contiguous().T for x in inputs]
    assert not strided[0].is_contiguous()
    assert torch.equal(op(*strided, **given), expected)
    made = op(*[x.clone().requires_grad_() for x in inputs], **given)
    assert torch.equal(made, expected) and not made.requires_grad


@EVERY_COMPUTING
def test_depth_and_key_are_accepted(name: str) -> None:
    op, given = registry[name], REQUIRED_VALUES.get(name, {})
    made = apply_to_tensors(op, some(op), given, depth=(0, 2), key="w")
    assert made.shape == (4, 3)


def test_stitch_has_nothing_to_compute() -> None:
    with pytest.raises(TypeError, match="by name"):
        registry["stitch"](torch.ones(2), rules={"*": 0})


@pytest.mark.parametrize("file", sorted(HERE.glob("*.py")), ids=lambda f: f.name)
def test_operators_know_nothing_of_the_rest_of_the_package(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2
            modules = [node.module or ""] if node.level == 0 else []
        else:
            continue
        for module in modules:
            assert module.split(".")[0] != "surgery" or module.startswith("surgery.ops"), module


@pytest.mark.parametrize("module", ["surgery", "surgery.ops", "surgery.errors"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_folder_is_not_a_package_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ops"], cwd=HERE.resolve().parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode and "surgery.ops" in done.stderr
