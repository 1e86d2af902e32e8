"""Pages, pictures and tables made from results: read back with html.parser and csv, against the JSON they were made from."""

from __future__ import annotations

import csv
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import BF16, llama_config, llama_tensors, surgery, write_checkpoint

pytest.importorskip("matplotlib")

from surgery.cli.diff_ import command as diff
from surgery.cli.interference_ import command as interference
from surgery.cli.report_ import command as report
from surgery.errors import Refused
from surgery.report import draw
from surgery.report.parts import Column, Section, Table, short
from surgery.report.read import read
from surgery.report.write import as_csv, write_html

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """What the tests look at: balanced tags, attributes, tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[dict[str, Any]] = []
        self.headings: list[str] = []
        self._text: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        assert len(said) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, said))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append({"caption": None, "head": [], "rows": [], "scopes": set(), "exact": []})
        elif tag == "tr" and self.tables:
            self.tables[-1]["rows"].append([])
            self.tables[-1]["exact"].append([])
        if tag in ("th", "td"):
            self.tables[-1]["exact"][-1].append(said.get("data-value"))
            self.tables[-1]["scopes"].add((tag, said.get("scope")))
        if tag in ("caption", "th", "td", "h1", "h2", "figcaption", "title"):
            self._text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"
        if self._text is None or tag not in ("caption", "th", "td", "h1", "h2", "figcaption", "title"):
            return
        text, self._text = "".join(self._text), None
        if tag == "caption":
            self.tables[-1]["caption"] = text
        elif tag in ("th", "td"):
            self.tables[-1]["rows"][-1].append(text)
        elif tag in ("h1", "h2"):
            self.headings.append(text)

    def table(self, caption: str) -> list[dict[str, str]]:
        """Rows of a table as column -> what is stored in full (text where it is no number)."""
        (found,) = [t for t in self.tables if t["caption"] == caption]
        head = found["rows"][0]
        return [
            {h: e if e is not None else c for h, c, e in zip(head, cells, exact, strict=True)}
            for cells, exact in zip(found["rows"][1:], found["exact"][1:], strict=True)
        ]


def checked(path: Path) -> Page:
    """A page that stands alone, with what makes it readable by keyboard and by ear."""
    text = path.read_text("utf-8")
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object", "image", "base", "form", "foreignobject"} & set(names)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)), "an id twice"
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on") and key not in ("src", "srcset", "xmlns", "xlink:href")
            if key == "href":
                assert value and value[0] == "#" and value[1:] in ids, (tag, value)
            if key in ("aria-labelledby", "aria-describedby"):
                assert value in ids
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#") and target[1:] in ids
    assert not re.search(r"https?://|@import|//[a-z]+\.", text)
    assert ("html", {"lang": "en"}) in page.tags
    metas = [a for tag, a in page.tags if tag == "meta"]
    assert any("width=device-width" in (a.get("content") or "") for a in metas)
    assert any("default-src 'none'" in (a.get("content") or "") for a in metas)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "prefers-color-scheme:dark" in style and "max-width:40rem" in style and ":focus-visible" in style
    for variable in set(re.findall(r"var\((--\w+)\)", text)):
        assert style.count(f"{variable}:") == 2, variable  # a colour for light and one for dark
    assert not re.search(r"#010[ab]0", text), "a placeholder colour is left"
    for table in page.tables:
        assert table["caption"] and len(table["rows"]) > 0
        assert {len(row) for row in table["rows"]} == {len(table["rows"][0])}
        assert table["scopes"] <= {("th", "col"), ("th", "row"), ("td", None)} and ("th", "col") in table["scopes"]
    regions = [a for tag, a in page.tags if tag == "div" and a.get("class") == "scroll"]
    assert len(regions) == len(page.tables) and all(a["tabindex"] == "0" and a["role"] == "region" for a in regions)
    pictures = [a for tag, a in page.tags if tag == "svg"]
    assert all(a["role"] == "img" and "viewbox" in a and "width" not in a for a in pictures)
    assert [a["class"] for a in pictures] == ["wide", "narrow"] * (len(pictures) // 2)  # one of each is shown
    return page


def drawn(page: Page) -> int:
    """Figures on a page."""
    return sum(tag == "figure" for tag, _ in page.tags)


def close(text: str, value: float | int | None) -> bool:
    return text == "–" if value is None else float(text) == value


# -- comparisons ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(5)
    base = llama_tensors(0, hidden=24, vocab=30)
    write_checkpoint(made / "base", base, config=llama_config(hidden=24, vocab=30))
    for label in ("a", "b", "c"):
        tensors = {n: (x.astype(np.float32) + 0.05 * rng.standard_normal(x.shape)).astype(BF16) for n, x in base.items()}
        if label == "b":
            tensors["extra <b>&amp;"] = np.ones(3, np.float32)
            tensors["model.norm.weight"] = base["model.norm.weight"]
        write_checkpoint(made / label, tensors, config=llama_config(hidden=24, vocab=30))
    return made


def call(command: Any, *args: Any) -> str:
    done = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_difference_page(folder: Path, tmp_path: Path) -> None:
    found = json.loads(call(diff, folder / "base", folder / "b", "--spectral", "--html", tmp_path / "d.html", "--json"))
    page = checked(tmp_path / "d.html")
    assert drawn(page) == 4
    keys = {"elements": "elements", "‖B − A‖": "norm", "relative": "relative", "cosine": "cosine", "largest change": "max_abs",
            "changed": "changed_share"}  # fmt: skip
    rows = page.table("Change per layer")
    assert [r["layer"] for r in rows] == [x["layer"] for x in found["layers"]]
    for row, layer in zip(rows, found["layers"], strict=True):
        assert all(close(row[title], layer[key]) for title, key in keys.items())
    rows = page.table("Every tensor")
    for row, tensor in zip(rows, found["tensors"], strict=True):
        assert row["tensor"] == tensor["name"] and all(close(row[title], tensor[key]) for title, key in keys.items())
        assert row["note"] == ("equal" if tensor["equal"] else "")
    rows = page.table("Singular values per matrix")
    matrices = [t for t in found["tensors"] if t["spectral"]]
    assert len(rows) == len(matrices) == 8
    for row, tensor in zip(rows, matrices, strict=True):
        s = tensor["spectral"]
        assert close(row["effective rank"], s["effective_rank"]) and close(row["intruders"], s["intruders"])
        assert close(row["overlap, in"], s["overlap_in"]) and close(row["largest singular value"], s["singular_values"][0])
    rows = page.table("Singular values per layer (k = 10, ε = 0.5)")
    with_any = [x for x in found["layers"] if x["spectral"]]
    assert [float(r["stable rank"]) for r in rows] == [x["spectral"]["stable_rank"] for x in with_any]
    text = (tmp_path / "d.html").read_text()
    assert "extra &lt;b&gt;&amp;amp;" in text and "extra <b>" not in text


def test_difference_page_without_spectra_and_of_twins(folder: Path, tmp_path: Path) -> None:
    call(diff, folder / "base", folder / "a", "--html", tmp_path / "d.html")
    page = checked(tmp_path / "d.html")
    assert drawn(page) == 1 and len(page.tables) == 2
    call(diff, folder / "a", folder / "a", "--html", tmp_path / "same.html", "--spectral")
    checked(tmp_path / "same.html")
    assert "same tensors with the same values" in (tmp_path / "same.html").read_text()


def test_pages_and_pictures_of_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(call(diff, folder / "base", folder / "a", "--spectral", "--json"))
    (tmp_path / "i x.json").write_text(
        call(interference, folder / "base", folder / "a", folder / "c", "--only", "*layers*", "--json")
    )
    call(
        report,
        tmp_path / "d.json",
        tmp_path / "i x.json",
        "-o",
        tmp_path / "r.html",
        "--png",
        tmp_path / "figs",
        "--title",
        "A & B",
    )
    page = checked(tmp_path / "r.html")
    assert page.headings == ["A & B", "Difference: d", "Interference: i x"]
    found = json.loads((tmp_path / "i x.json").read_text())
    rows = page.table("Interference per matrix")
    for row, t in zip(rows, found["tensors"], strict=True):
        assert row["matrix"] == t["name"] and close(row["STI"], t["sti"]) and close(row["by chance, in"], t["chance_in"])
    cells = page.table("Interference by layer and kind of matrix")
    assert [r["layer"] for r in cells] == [x["layer"] for x in found["layers"]]
    shown = {f"{r['layer']}.{kind}": v for r in cells for kind, v in r.items() if kind != "layer"}
    assert {n: float(v) for n, v in shown.items()} == {t["name"]: t["relative"] for t in found["tensors"]}
    files = {p.name for p in (tmp_path / "figs").iterdir()}
    assert {
        "difference-d-change.png",
        "difference-d-spectra.png",
        "interference-i-x-map.png",
        "interference-i-x-map.csv",
    } <= files
    for file in files:
        raw = (tmp_path / "figs" / file).read_bytes()
        if file.endswith(".png"):
            assert raw[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", raw[16:24])) > 300
    with (tmp_path / "figs" / "interference-i-x-matrices.csv").open(newline="") as file:
        read_back = list(csv.DictReader(file))
    assert [float(r["relative"]) for r in read_back] == [t["relative"] for t in found["tensors"]]


def test_the_same_results_make_the_same_page(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(call(diff, folder / "base", folder / "a", "--json"))
    for name in ("one", "two"):
        call(report, tmp_path / "d.json", "-o", tmp_path / f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


# -- evaluations ---------------------------------------------------------------------------------------------------------


def estimate(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "units": 50}


def evaluation() -> dict[str, Any]:
    from surgery.lab.outcome import Labelled
    from surgery.lab.reliability import reliability

    rng = np.random.default_rng(0)
    outcome = Labelled(rng.standard_normal((200, 3)) * 2, rng.integers(0, 3, 200))
    models = []
    for i, name in enumerate(("merge", "a & b")):
        tasks: dict[str, Any] = {
            t: {"split": "test", "measures": {"accuracy": estimate(0.5 + i / 7 + j / 9), "ece": estimate(0.1)}}
            for j, t in enumerate(("rot90", "inv"))
        }
        tasks["inv"]["difference"] = {"accuracy": estimate(-0.2)}
        tasks["inv"]["measures"]["nll"] = {"value": 1.25, "low": None, "high": None, "units": 1}
        tasks["rot90"]["calibration"] = reliability(outcome)
        models.append({"model": name, "tasks": tasks})
    matrix = [{"rot90": estimate(0.9), "inv": estimate(0.6)}, {"rot90": estimate(0.7), "inv": estimate(0.95)}]
    stages = {"measure": "accuracy", "models": ["merge", "a & b"], "tasks": ["rot90", "inv"], "matrix": matrix}
    stages |= {"backward_transfer": estimate(-0.2), "forgetting": estimate(0.2), "final": estimate(0.825)}
    return {"models": models, "stages": stages}


def test_evaluation_page(tmp_path: Path) -> None:
    data = evaluation()
    (tmp_path / "eval.json").write_text(json.dumps(data))
    call(report, tmp_path / "eval.json", "-o", tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    rows = {(r["model"], r["task"], r["measure"]): r for r in page.table("Every measure with its interval")}
    assert len(rows) == 10
    for model in data["models"]:
        for task, result in model["tasks"].items():
            for measure, e in result["measures"].items():
                row = rows[model["model"], task, measure]
                assert all(close(row[k], e[k]) for k in ("value", "low", "high", "units"))
    assert [float(r["value"]) for r in page.table("Differences from the reference")] == [-0.2, -0.2]
    bins = data["models"][0]["tasks"]["rot90"]["calibration"]
    rows = page.table("Calibration of merge on rot90")
    assert all(
        close(r["accuracy"], b["accuracy"]) and close(r["examples"], b["count"]) for r, b in zip(rows, bins, strict=True)
    )
    assert [float(r["inv"]) for r in page.table("accuracy after every stage")] == [0.6, 0.95]
    assert float(page.table("Forgetting and backward transfer")[1]["value"]) == 0.2


def test_one_model_and_a_list_of_models(tmp_path: Path) -> None:
    models = evaluation()["models"]
    for name, data in (("one", models[0]), ("list", models)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    sections = read([tmp_path / "one.json", tmp_path / "list.json"])
    assert [len(s.tables[0].rows) for s in sections] == [5, 10]


def test_bins_of_calibration_are_those_of_ece() -> None:
    from surgery.lab.measures import LABELLED, Context
    from surgery.lab.outcome import Labelled
    from surgery.lab.reliability import reliability

    rng = np.random.default_rng(1)
    outcome = Labelled(rng.standard_normal((500, 4)) * 3, rng.integers(0, 4, 500))
    bins = reliability(outcome)
    assert sum(b["count"] for b in bins) == 500 and [b["low"] for b in bins] == [i / 15 for i in range(15)]
    ece = sum(b["count"] / 500 * abs(b["accuracy"] - b["confidence"]) for b in bins if b["count"])
    measure = LABELLED["ece"]
    assert ece == pytest.approx(float(measure.finish(measure.features(outcome, Context()).sum(axis=0, keepdims=True))[0]))
    sure = reliability(Labelled(np.array([[0.0, -np.inf], [0.0, -np.inf]]), np.array([0, 1])))
    assert sure[-1] == {"low": 14 / 15, "high": 1.0, "count": 2, "confidence": 1.0, "accuracy": 0.5}
    assert sure[0]["accuracy"] is None


# -- sweeps --------------------------------------------------------------------------------------------------------------


def sweep(params: list[dict[str, Any]], goals: tuple[str, ...] = ("rot90", "inv")) -> dict[str, Any]:
    trials = []
    for i, point in enumerate(params):
        values = {g: {"accuracy": estimate(0.5 + 0.4 * np.sin(i * (j + 1)), 0.05)} for j, g in enumerate(goals)}
        score = float(np.mean([v["accuracy"]["value"] for v in values.values()]))
        trials.append({"number": i, "params": point, "values": values, "score": score, "seconds": 0.1})
    best = max(trials, key=lambda t: t["score"])
    test = {g: {"split": "test", "measures": {"accuracy": estimate(0.7)}} for g in goals}
    chosen = {
        "trial": best["number"],
        "params": best["params"],
        "score": best["score"],
        "validation": best["values"],
        "test": test,
    }
    made = {"method": "grid", "objective": dict.fromkeys(goals, "accuracy"), "trials_made": len(trials), "trials_failed": 0,
            "chosen": chosen, "trials": trials}  # fmt: skip
    return made | ({"pareto": [best["number"], 0]} if len(goals) > 1 else {})


def sweep_page(tmp_path: Path, data: dict[str, Any]) -> Page:
    (tmp_path / "found").mkdir(exist_ok=True)
    (tmp_path / "found" / "results.json").write_text(json.dumps(data))
    call(report, tmp_path / "found", "-o", tmp_path / "r.html")
    return checked(tmp_path / "r.html")


def test_a_path_is_a_curve(tmp_path: Path) -> None:
    data = sweep([{"steps.wise.alpha": a} for a in (0.5, 0.0, 1.0, 0.25)])
    page = sweep_page(tmp_path, data)
    rows = page.table("Objectives over steps.wise.alpha")
    assert [float(r["steps.wise.alpha"]) for r in rows] == [0.0, 0.25, 0.5, 1.0]
    for row in rows:
        trial = next(t for t in data["trials"] if t["params"]["steps.wise.alpha"] == float(row["steps.wise.alpha"]))
        for key, end in (("value", ""), ("low", ", low"), ("high", ", high")):
            assert float(row[f"inv accuracy{end}"]) == trial["values"]["inv"]["accuracy"][key]
    front = page.table("inv accuracy against rot90 accuracy")
    assert {int(r["trial"]) for r in front if r["on the front"] == "yes"} == set(data["pareto"])
    chosen = page.table("What was chosen")
    assert [float(r["test"]) for r in chosen] == [0.7, 0.7]
    assert [float(r["validation"]) for r in chosen] == [v["accuracy"]["value"] for v in data["chosen"]["validation"].values()]
    assert len(page.table("Every trial")) == 4


def test_a_grid_is_a_heat_map(tmp_path: Path) -> None:
    data = sweep([{"w": w, "d": d} for w in (0.2, 0.4, 0.6) for d in (1, 2)][:-1], goals=("rot90",))
    page = sweep_page(tmp_path, data)
    rows = page.table("Score by the two numbers")
    scores = {(t["params"]["w"], t["params"]["d"]): t["score"] for t in data["trials"]}
    for row in rows:
        for d in (1, 2):
            assert close(row[str(d)], scores.get((float(row["w \\ d"]), d)))
    assert len(rows) == 3 and rows[-1]["2"] == "–"


def test_scattered_trials_soups_and_failures(tmp_path: Path) -> None:
    data = sweep([{"w": 0.1 * i, "d": 0.3 + i * i} for i in range(6)], goals=("a", "b", "c"))
    data["trials"].append(
        {"number": 6, "params": {"w": 9.0, "d": 1.0}, "values": {}, "seconds": 0.0, "error": "a measure is not finite"}
    )
    data |= {"trials_made": 7, "trials_failed": 1}
    page = sweep_page(tmp_path, data)
    assert drawn(page) == 5  # two numbers, three pairs of objectives
    last = page.table("Every trial")[-1]
    assert last["problem"] == "a measure is not finite" and last["score"] == "–" and float(last["w"]) == 9.0
    page = sweep_page(tmp_path, sweep([{"steps.soup.weight": [1, 0]}, {"steps.soup.weight": [1, 1]}], goals=("a",)))
    assert drawn(page) == 0
    assert [r["steps.soup.weight"] for r in page.table("Every trial")] == ["[1, 0]", "[1, 1]"]


# -- what goes wrong -----------------------------------------------------------------------------------------------------


def test_what_is_no_result_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("bad", "{"), ("list", "[1]"), ("other", '{"x": 1}')):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "torn.json").write_text(json.dumps({k: v for k, v in sweep([{"w": 1.0}]).items() if k != "trials_made"}))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "trials.jsonl").write_text("")
    for name, message in (("bad.json", "is not JSON"), ("list.json", "expected an object"), ("other.json", "no result that reports know"),
                          ("torn.json", "looks like a sweep, but lacks `trials_made`"), ("none.json", "no such file"),
                          ("begun", "has no results.json"), ("", "has no results.json")):  # fmt: skip
        with pytest.raises(Refused, match=message):
            read([tmp_path / name])
    with pytest.raises(Refused, match="nothing to write"):
        call(report, tmp_path / "bad.json")
    with pytest.raises(Refused, match="cannot be written"):
        write_html(tmp_path / "bad.json" / "r.html", [Section("s", "t")])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(Refused, match="need matplotlib"):
        draw.need_matplotlib()


def test_names_and_numbers() -> None:
    assert short("model.layers.11.self_attn.q_proj.weight") == "self_attn.q_proj.weight"
    assert short("x" * 40) == "…" + "x" * 23 and short("") == ""
    table = Table("t", "c", [Column("a"), Column("b")], [["x, y", 0.1], ['"', None], [1, True]])
    assert as_csv(table) == 'a,b\n"x, y",0.1\n"""",\n1,True\n'


def test_they_are_commands(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text(
        call(interference, folder / "base", folder / "a", folder / "c", "--only", "*q_proj*", "--json")
    )
    done = surgery("report", tmp_path / "i.json", "-o", tmp_path / "r.html")
    assert done.returncode == 0 and "1 result" in done.stderr and done.stdout == ""
    checked(tmp_path / "r.html")
    refused = surgery("report", tmp_path / "nothing.json", "-o", tmp_path / "r.html")
    assert refused.returncode == 2 and "no such file" in refused.stderr
