"""Corruptions against formulas written out here; families of tasks; robustness against a loop over resamples."""

import math
from pathlib import Path

import numpy as np
import pytest
from lab_rig import Net, classifier, jsonl

import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.bootstrap import Draws, Settings, combined
from surgery.lab.corrupt import CORRUPTIONS, chosen, corrupted
from surgery.lab.evaluation import Evaluator, Report
from surgery.lab.judge import Result
from surgery.lab.robust import robustness
from surgery.lab.together import beside

X = np.random.default_rng(0).random((5, 2, 7, 6)).astype(np.float32)


def apply(name: str, values, **options):
    said = chosen({name: options}, CORRUPTIONS[name].of)
    return corrupted(values, name, said[name])


def test_images() -> None:
    noisy = np.concatenate([apply("noise", np.zeros((400, 1, 8, 8), np.float32), sigma=0.4).ravel()])
    assert abs(noisy.mean()) < 0.01 and noisy.std() == pytest.approx(0.4, rel=0.01)
    assert np.array_equal(apply("noise", X)[:2], apply("noise", X[:2])) and not np.allclose(
        apply("noise", X, seed=1), apply("noise", X)
    )
    padded = np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge").astype(np.float64)
    mean = sum(padded[..., i : i + 7, j : j + 6] for i in range(3) for j in range(3)) / 9
    np.testing.assert_allclose(apply("blur", X), mean, atol=1e-6)
    hidden = apply("occlude", X + 1)
    for image, whole in zip(hidden, X + 1, strict=True):
        rows, columns = np.nonzero((image != whole).all(axis=0))
        assert np.ptp(rows) == np.ptp(columns) == 2 and (image == 0).sum() == 2 * 9
    assert len({tuple(np.argwhere(i[0] == 0)[0]) for i in hidden}) > 1
    np.testing.assert_allclose(apply("contrast", X), 0.35 * X + 0.3, atol=1e-6)
    moved = apply("shift", X, right=2, down=-1)
    assert np.array_equal(moved[..., :-1, 2:], X[..., 1:, :-2]) and not moved[..., -1, :].any() and not moved[..., :2].any()
    square = X[..., :6, :]
    np.testing.assert_allclose(apply("rotate", square, degrees=90), np.rot90(square, 1, (2, 3)), atol=1e-5)
    np.testing.assert_allclose(apply("resize", X, factor=1.0), X, atol=1e-6)
    small = apply("resize", np.ones((1, 1, 8, 8), np.float32), factor=0.5)
    assert 9 <= small.sum() <= 25 and small[0, 0, 0].sum() == 0 and small[0, 0, 3, 3] == 1
    assert np.array_equal(apply("background", X, value=0.5), np.maximum(X, np.float32(0.5)))


def test_texts() -> None:
    texts = ["the quick, brown fox jumps over them", "a", "It was. Very good!"] * 30
    typos = apply("typos", texts, share=1.0)
    for before, after in zip(texts, typos, strict=True):
        for a, b in zip(before.split(), after.split(), strict=True):
            assert sorted(a) == sorted(b) and a[0] == b[0]
    assert typos[0] != texts[0] and typos[1] == "a" and apply("typos", texts, share=1e-9) == texts
    shorter = apply("letters", texts, share=1.0)
    assert len(shorter[0]) == len(texts[0]) - 7 and shorter[1] == "a"
    kept = [len(t.split(" ")) for t in apply("drop", texts, share=0.5)]
    assert min(kept) >= 1 and 0.4 < sum(kept) / sum(len(t.split(" ")) for t in texts) < 0.65
    swapped = apply("shuffle", texts, share=0.4)
    assert all(sorted(a.split(" ")) == sorted(b.split(" ")) for a, b in zip(texts, swapped, strict=True)) and swapped != texts
    assert (
        apply("upper", ["aB."]) == ["AB."]
        and apply("lower", ["aB."]) == ["ab."]
        and apply("unpunctuated", ["a-b, c."]) == ["ab c"]
    )
    assert apply("typos", texts)[:4] == apply("typos", texts[:4])


@pytest.mark.parametrize(
    "said, problem",
    [
        ("corruptions: [nosie]", "1:?|there is no corruption `nosie` of images\nhint: did you mean `noise`"),
        ("corruptions: [typos]", "there is no corruption `typos` of images; it is one of texts"),
        ("corruptions: {noise: {sgima: 1}}", "`noise` has no parameter `sgima`"),
        ("corruptions: {blur: {size: 2.5}}", "`size` cannot be 2.5"),
        ("corruptions: {}", "is a list of names, or a map"),
        ("shift_of: b", "`shift_of` names no task `b`"),
        ("shift_of: c", "cannot be a shift of `c`, a perplexity"),
    ],
)
def test_what_tasks_files_get_wrong(tmp_path: Path, said: str, problem: str) -> None:
    (tmp_path / "t.yaml").write_text(
        f"tasks:\n  a: {{kind: images, test: x.npz, {said}}}\n  c: {{kind: perplexity, test: x.txt}}\n"
    )
    with pytest.raises(Refused, match=problem):
        lab.read_tasks(tmp_path / "t.yaml")


def test_kinds_without_corruptions(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has no `corruptions`"):
        lab.make_task("t", {"kind": "tokens", "test": "x", "corruptions": ["upper"]})
    np.savez(tmp_path / "flat.npz", images=np.zeros((4, 64), np.float32), labels=np.zeros(4, int))
    task = lab.make_task("t", {"kind": "images", "test": "flat.npz", "corruptions": ["blur"]}, folder=tmp_path)
    with pytest.raises(Refused, match="are no images to corrupt"):
        lab.evaluate(Net(), task)


def test_tasks_are_followed_by_their_shifts(rig: Path, tmp_path: Path) -> None:
    said = f"tasks:\n  a: {{kind: images, test: {rig}/data/clean-test.npz, corruptions: [contrast, shift]}}\n  b: {{kind: images, test: {rig}/data/inv-test.npz, shift_of: a}}\n"
    (tmp_path / "t.yaml").write_text(said)
    tasks = lab.read_tasks(tmp_path / "t.yaml")
    assert [(t.name, t.family) for t in tasks] == [("a", "a"), ("a+contrast", "a"), ("a+shift", "a"), ("b", "a")]
    model = Net()
    found = Evaluator(tasks).outcomes(model, {t.name: "test" for t in tasks})
    with np.load(rig / "data/clean-test.npz") as file:
        images = file["images"]
    import torch

    with torch.inference_mode():
        wanted = model.eval()(torch.from_numpy(0.35 * images + 0.3).float()).double().numpy()
    np.testing.assert_allclose(found["a+contrast", "test"].scores, wanted, atol=1e-4)
    assert (found["a+contrast", "test"].labels == found["a", "test"].labels).all()


def test_texts_reach_the_model_corrupted(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "c", ["no", "yes"])
    jsonl(tmp_path / "d.jsonl", [{"text": "Good film", "label": "no"}, {"text": "good film", "label": "yes"}])
    task = lab.make_task("t", {"kind": "classification", "test": "d.jsonl", "corruptions": ["lower"]}, folder=tmp_path)
    found = Evaluator(task).outcomes(folder, {"t": "test", "t+lower": "test"})
    plain, lower = found["t", "test"].scores, found["t+lower", "test"].scores
    assert not np.allclose(plain[0], plain[1]) and np.allclose(lower[0], lower[1]) and np.allclose(lower[1], plain[1])


def report(name: str, inside: float, shifts: list[float], seed: int) -> Report:
    """A report whose draws are made here: a task `t` and its shifts, resampled alike."""
    rng, units = np.random.default_rng(seed), 40
    made = {}
    for i, value in enumerate([inside, *shifts]):
        draws = Draws(
            value, np.clip(value + 0.02 * rng.standard_normal(300), 0.01, 0.99), value + 0.001 * rng.standard_normal(units)
        )
        key = "t" if i == 0 else f"t+{i}"
        made[key] = Result(key, "test", {}, draws={"accuracy": draws}, better={"accuracy": "high"}, family="t")
    return Report(name, made)


def test_effective_robustness_is_the_residual_of_the_line_in_logits() -> None:
    reports = [
        report("a", 0.6, [0.4, 0.5], 0),
        report("b", 0.8, [0.5, 0.66], 1),
        report("c", 0.9, [0.72, 0.8], 2),
        report("m", 0.85, [0.8, 0.78], 3),
    ]

    def residual(read) -> float:
        xs, ys = [], []
        for r in reports[:3]:
            xs.append(math.log(read(r, "t") / (1 - read(r, "t"))))
            outside = (read(r, "t+1") + read(r, "t+2")) / 2
            ys.append(math.log(outside / (1 - outside)))
        slope, offset = np.polyfit(xs, ys, 1)
        own = read(reports[3], "t")
        expected = 1 / (1 + math.exp(-(slope * math.log(own / (1 - own)) + offset)))
        return (read(reports[3], "t+1") + read(reports[3], "t+2")) / 2 - expected

    found = {r.model: r for r in robustness(reports, baselines=("a", "b", "c"))}["m"]
    assert found.inside.value == 0.85 and found.outside.value == pytest.approx(0.79) and found.lost.value == pytest.approx(0.06)
    assert found.effective is not None
    assert found.effective.value == pytest.approx(residual(lambda r, t: r.results[t].draws["accuracy"].value))
    many = [residual(lambda r, t, i=i: r.results[t].draws["accuracy"].resampled[i]) for i in range(300)]
    low, high = np.quantile(many, [0.025, 0.975])
    assert found.effective.low == pytest.approx(low, abs=0.02) and found.effective.high == pytest.approx(high, abs=0.02)
    assert robustness(reports)[0].effective is None
    with pytest.raises(Refused, match="one gives no line"):
        robustness(reports, baselines=("a",))
    with pytest.raises(Refused, match="baseline `x` is none of the models"):
        robustness(reports, baselines=("x", "a"))


def test_what_is_combined_resamples_and_leaves_out_together() -> None:
    rng = np.random.default_rng(0)
    data = rng.random((50, 2))
    draws = [Draws(float(c.mean()), rng.random(20), (c.sum() - c) / 49) for c in data.T]
    paired = combined(lambda v: v[0] - v[1], draws, [0, 0])
    np.testing.assert_allclose(paired.without, draws[0].without - draws[1].without - (draws[0].value - draws[1].value))
    apart = combined(lambda v: v[0] - v[1], draws, [0, 1])
    assert (
        len(apart.without) == 100
        and apart.value == paired.value
        and (apart.resampled == draws[0].resampled - draws[1].resampled).all()
    )
    assert np.isnan(combined(lambda v: v[0], [Draws(1.0, np.ones(9), np.full(1, np.nan))], [0]).estimate(0.95).low)


def test_robustness_of_real_models(rig: Path) -> None:
    task = lab.make_task("d", {"kind": "images", "test": f"{rig}/data/rot90-test.npz", "corruptions": ["noise", "shift"]})
    resident = lab.Resident(build=lambda config: Net())
    models = {n: rig / n for n in ("base", "rot90", "other")}
    reports = beside(models, task, resident=resident, settings=Settings(100))
    found = robustness(reports, baselines=("base", "other"), settings=Settings(100))
    assert [(r.model, r.shifts) for r in found] == [(m, ["d+noise", "d+shift"]) for m in models]
    for r, rep in zip(found, reports, strict=True):
        outside = (rep["d+noise"]["accuracy"].value + rep["d+shift"]["accuracy"].value) / 2
        assert r.lost.value == pytest.approx(rep["d"]["accuracy"].value - outside) and r.lost.low <= r.lost.value <= r.lost.high
        assert r.lost.value > 0
    assert abs(found[0].effective.value) < 1e-9 and abs(found[2].effective.value) < 1e-9  # two baselines lie on their line
