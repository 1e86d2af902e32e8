"""Every measure and interval against an independent reference: scikit-learn, scipy, or the formula in a loop."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn import metrics

from surgery.errors import Refused
from surgery.lab import measures
from surgery.lab.bootstrap import Draws, Settings, draw, grouped
from surgery.lab.judge import minus, result
from surgery.lab.measures import LABELLED, LANGUAGE, Context
from surgery.lab.outcome import Labelled, Language, ensemble
from surgery.lab.spans import spans


def outcome(n: int = 200, c: int = 5, *, seed: int = 0, scale: float = 2.0) -> Labelled:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    scores = rng.normal(size=(n, c)) * scale
    scores[np.arange(n), labels] += 1.5
    return Labelled(scores, labels)


def value(name: str, o, context: Context | None = None) -> float:
    measure = (LANGUAGE if isinstance(o, Language) else LABELLED)[name]
    return float(measure.finish(measure.features(o, context or Context()).sum(axis=0, keepdims=True))[0])


def naive_ece(p: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(len(p)) if b / bins < p[i].max() <= (b + 1) / bins]
        if inside:
            right = sum(p[i].argmax() == labels[i] for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(right - sum(p[i].max() for i in inside) / len(inside))
    return total


@pytest.mark.parametrize("seed", range(3))
def test_labelled_measures(seed: int) -> None:
    o, other = outcome(seed=seed), outcome(seed=seed + 50)
    p, q = scipy.special.softmax(o.scores, axis=1), scipy.special.softmax(other.scores, axis=1)
    said = p.argmax(1)
    assert value("accuracy", o) == pytest.approx(metrics.accuracy_score(o.labels, said))
    assert value("nll", o) == pytest.approx(metrics.log_loss(o.labels, p, labels=range(5)))
    assert value("brier", o) == pytest.approx(((p - np.eye(5)[o.labels]) ** 2).sum(1).mean())
    assert value("confidence", o) == pytest.approx(p.max(1).mean())
    assert value("ece", o) == pytest.approx(naive_ece(p, o.labels))
    assert value("f1", o) == pytest.approx(metrics.f1_score(o.labels, said, average="macro"))
    context = Context(reference=other)
    assert value("kl", o, context) == pytest.approx(scipy.stats.entropy(q, p, axis=1).mean())
    assert value("agreement", o, context) == pytest.approx((said == q.argmax(1)).mean())


def test_f1_counts_only_classes_that_occur() -> None:
    o = Labelled(np.eye(4)[[0, 0, 1, 2]] * 9.0, np.array([0, 1, 1, 2]))
    assert value("f1", o) == pytest.approx(metrics.f1_score([0, 1, 1, 2], [0, 0, 1, 2], average="macro"))


def test_temperature_is_where_scipy_finds_it_and_lowers_ece() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1500, 5)) * 1.5
    labels = np.array([rng.choice(5, p=p) for p in scipy.special.softmax(logits, axis=1)])
    o = Labelled(3 * logits, labels)  # three times too sure
    found = measures.temperature(o)
    grid = np.linspace(2, 4, 401)
    rows = np.arange(len(labels))
    losses = [-scipy.special.log_softmax(o.scores / t, axis=1)[rows, labels].mean() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.006) and 2.6 < found < 3.4
    scaled = value("ece_scaled", o, Context(temperature=found))
    assert scaled == pytest.approx(naive_ece(scipy.special.softmax(o.scores / found, axis=1), o.labels))
    assert scaled < value("ece", o) / 2


def test_choices_that_an_example_does_not_have() -> None:
    o = Labelled(np.array([[0.0, 1.0, -np.inf], [2.0, 0.0, 1.0]]), np.array([1, 0]))
    assert value("nll", o) == pytest.approx((-np.log(math.e / (1 + math.e)) - np.log(math.e**2 / (math.e**2 + 1 + math.e))) / 2)
    assert value("kl", o, Context(reference=o)) == 0.0
    assert np.isfinite(value("brier", o))


def test_language_measures() -> None:
    rng = np.random.default_rng(0)
    o = Language(
        rng.uniform(5, 50, 30), rng.integers(5, 20, 30).astype(float), rng.integers(20, 90, 30).astype(float), np.arange(30)
    )
    total = o.nll.sum()
    assert value("nll", o) == pytest.approx(total / o.tokens.sum())
    assert value("perplexity", o) == pytest.approx(math.exp(total / o.tokens.sum()))
    assert value("bits_per_byte", o) == pytest.approx(total / math.log(2) / o.bytes.sum())


@pytest.mark.parametrize(
    "tags, found",
    [
        ("B-P I-P O B-L", {(0, 2, "P"), (3, 4, "L")}),
        ("B-P B-P", {(0, 1, "P"), (1, 2, "P")}),
        ("I-P I-P I-L", {(0, 2, "P"), (2, 3, "L")}),
        ("S-P B-L I-L E-L O S-P", {(0, 1, "P"), (1, 4, "L"), (5, 6, "P")}),
        ("O O", set()),
        ("E-P B-P", {(0, 1, "P"), (1, 2, "P")}),
    ],
)
def test_spans(tags: str, found: set) -> None:
    assert spans(tags.split()) == found


def test_span_f1_counts_by_sentence() -> None:
    names = ("O", "B-P", "I-P")
    true, said = [1, 2, 0, 1, 0, 1], [1, 2, 0, 0, 0, 1]
    o = Labelled(np.eye(3)[said] * 5.0, np.array(true), groups=np.array([0, 0, 0, 0, 1, 1]), names=names)
    assert value("span_f1", o) == pytest.approx(2 * 2 / (2 + 3))


def test_intervals_are_scipys_bca() -> None:
    """scipy resamples by itself: same method, other random numbers."""
    values = np.random.default_rng(1).exponential(size=60)
    features = np.stack([values, np.ones(60)], axis=1)
    (ours,) = draw([features], [lambda s: s[:, 0] / s[:, 1]], Settings(20000), "x")
    estimate = ours.estimate(0.95)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20000, method="BCa", rng=np.random.default_rng(2))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert estimate.value == pytest.approx(values.mean())
    assert abs(estimate.low - theirs.confidence_interval.low) < 0.04 * width
    assert abs(estimate.high - theirs.confidence_interval.high) < 0.04 * width


def test_intervals_cover_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(5), 0
    for i in range(200):
        values = (rng.random(80) < 0.7).astype(float)
        (d,) = draw([np.stack([values, np.ones(80)], 1)], [lambda s: s[:, 0] / s[:, 1]], Settings(400), f"run {i}")
        e = d.estimate(0.9)
        hits += e.low <= 0.7 <= e.high
    assert 0.82 <= hits / 200 <= 0.97


def test_whole_groups_are_resampled() -> None:
    features = np.arange(12.0).reshape(6, 2)
    assert grouped(features, np.array([4, 4, 1, 1, 1, 9])).tolist() == [[18, 21], [2, 4], [10, 11]]
    assert grouped(features, np.arange(6)).tolist() == features.tolist()
    perfect = np.repeat(np.array([0.0, 1.0] * 10), 50)  # the same within a group: 20 units, not 1000
    f = np.stack([perfect, np.ones(1000)], 1)
    finish = [lambda s: s[:, 0] / s[:, 1]]
    (loose,), (tight,) = (
        draw([grouped(f, u)], finish, Settings(), "g") for u in (np.repeat(np.arange(20), 50), np.arange(1000))
    )
    widths = [e.high - e.low for e in (loose.estimate(0.95), tight.estimate(0.95))]
    assert widths[0] > 4 * widths[1]


def test_a_single_example_has_no_interval_and_says_so() -> None:
    found = result("t", "test", Labelled(np.array([[1.0, 0.0]]), np.array([0])), [LABELLED["accuracy"]], Settings(50))
    assert found.estimates["accuracy"].value == 1.0 and math.isnan(found.estimates["accuracy"].low)
    assert found.as_dict()["measures"]["accuracy"] == {"value": 1.0, "low": None, "high": None, "units": 1}


def test_differences_are_paired() -> None:
    o = outcome(300)
    better = Labelled(o.scores + 0.8 * np.eye(5)[o.labels], o.labels)
    chosen = [LABELLED["accuracy"], LABELLED["nll"]]
    same = result("t", "test", o, chosen, Settings(), reference=o)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in same.difference.values())
    found = result("t", "test", better, chosen, Settings(), reference=o)
    own = found.estimates["nll"]
    assert found.difference["nll"].high < 0 and found.difference["accuracy"].low > 0
    assert found.difference["nll"].high - found.difference["nll"].low < (own.high - own.low) / 2


def test_the_same_draws_for_the_same_key_whatever_is_measured_beside() -> None:
    o = outcome()
    one = result("t", "test", o, [LABELLED["nll"]], Settings())
    many = result("t", "test", o, list(LABELLED.values())[:4], Settings())
    assert one.estimates["nll"] == many.estimates["nll"]
    assert result("u", "test", o, [LABELLED["nll"]], Settings()).estimates["nll"] != one.estimates["nll"]


def test_ensemble_averages_logits() -> None:
    a, b = outcome(), outcome(seed=9)
    b = Labelled(b.scores, a.labels)
    assert np.array_equal(ensemble([a, b]).scores, (a.scores + b.scores) / 2)
    with pytest.raises(Refused, match="same classes"):
        ensemble([a, outcome(c=4)])


def test_minus_keeps_resamples_together() -> None:
    a, b = Draws(3.0, np.array([1.0, 2.0]), np.array([3.0])), Draws(1.0, np.array([0.5, 3.0]), np.array([1.0]))
    assert minus(a, b).resampled.tolist() == [0.5, -1.0] and minus(a, b).value == 2.0


def test_measures_that_a_task_cannot_give() -> None:
    with pytest.raises(Refused, match="task x cannot give `perplexity`"):
        measures.find("perplexity", Labelled, "task x")
    with pytest.raises(Refused, match="did you mean `accuracy`"):
        measures.find("acuracy", Labelled, "task x")
