"""`report`: what is on the page, that what comes from data stays text, and that a browser shows it whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import registry
from registry import InputError
from registry.comparison import collect
from registry.data.demo import generate
from registry.metrics import CLASSES, SIMS_EDGES, finest_classes, regression
from registry.reporting.clips import MOST_WRONG
from registry.reporting.figures import MOST_POINTS, scatters
from registry.reporting.pictures import Panel, shortened, svg
from tests.helpers import feature_file
from tests.test_comparison import compare_in

SIZES = {"train": 8, "valid": 4, "test": 12}
HOSTILE = [
    "<script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title = \'owned\'">',
    '"]]>--></style></svg></table>',
    "{{ 7 * 7 }} {% raw %} $\\frac{1}{2}$ &amp; &#60;",
    "مرحبا \u202eabc\u202c שלום",
    "long " * 2000,
]
MODELS = """
import torch
from registry import FusionOutput, register_model


@register_model("mean", summary="means", needs=("audio", "vision"))
class Mean(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.feature_dims = {"audio": data.dims["audio"], "vision": data.dims["vision"], "fusion": data.dims["audio"]}
        self.linear = torch.nn.Linear(data.dims["audio"], 1)

    def forward(self, batch):
        audio = batch.audio.sum(1) / batch.audio_lengths[:, None]
        vision = batch.vision.sum(1) / batch.vision_lengths[:, None]
        features = {"audio": audio, "vision": vision, "fusion": self.linear.weight * audio}
        return FusionOutput(prediction=self.linear(audio).squeeze(-1), features=features)
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Reader(HTMLParser):
    """Reads a page, and fails where its tags are not balanced."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes)), attributes
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append(" ".join(data.split()))

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with the runs of three models, one with generated labels, on clips whose ids and texts are hostile."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "models.py").write_text(MODELS)
    own = {name: {f"regression_labels_{task}": np.linspace(-3, 3, n) for task in "TA"} for name, n in SIZES.items()}
    own["test"] |= {
        "id": [f"{clip} {text}" for clip, text in enumerate(HOSTILE * 2)],
        "raw_text": HOSTILE * 2,
        "regression_labels_A": np.linspace(3, -3, 12),
    }
    data = feature_file(folder, sizes=SIZES, **own)
    models = ["mean", "mean+heads", "mean+ulgm"]
    compare_in(folder, str(folder / "models.py"), models, data=data, config={"epochs": 3})
    return folder


@pytest.fixture(scope="module")
def page(work) -> Path:
    path = work / "report.html"
    registry.report([work / "runs"], path, data=work / "features.pkl")
    return path


@pytest.fixture
def runs(work, tmp_path) -> Path:
    """A copy of the runs, to change."""
    return Path(shutil.copytree(work / "runs", tmp_path / "runs"))


def edit(folder: Path, name: str, **changes: object) -> None:
    """Change keys of a JSON file of every run below a folder."""
    for path in folder.rglob(name):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- what is on the page


def test_every_section_and_model_is_there(page):
    reader = Reader(page)
    sections = [attributes["id"] for tag, attributes in reader.tags if tag == "section"]
    assert sections == [
        *("results", "differences", "what", "seeds", "learning-curves", "predictions", "confusion"),
        *("label-distributions", "label-movement", "disagreement", "errors", "settings"),
    ]
    assert [attributes["href"] for tag, attributes in reader.tags if tag == "a"] == [f"#{key}" for key in sections]
    for name in ("mean", "mean+heads", "mean+ulgm"):
        assert reader.texts.count(name) >= 5
    assert sum(tag == "svg" for tag, _ in reader.tags) == 1 + 3 * 3 + 2


def test_the_tables_are_those_of_the_comparison(page, work):
    texts = Reader(page).texts
    for row in collect([work / "runs"]).rows:
        assert texts.count(f"{row.mean['MAE']:.4f}") >= 1
        assert texts.count(f"± {row.std['MAE']:.4f}") >= 1


def test_the_clips_of_the_largest_errors(page, work):
    tables = [pd.read_csv(path) for path in (work / "runs").rglob("predictions.csv")]
    by_model = [np.mean([t["prediction"] for t in tables[2 * m : 2 * m + 2]], axis=0) for m in range(3)]
    worst = np.argmax(np.mean([abs(p - tables[0]["label"]) for p in by_model], axis=0))
    section = page.read_text("utf-8").partition('<section id="errors"')[2]
    first = section.partition("<tbody>")[2].partition("</td>")[0]
    assert f">{worst} " in first


def test_what_clips_say_stays_text(page):
    reader = Reader(page)
    assert not {"script", "img", "iframe", "object", "link"} & {tag for tag, _ in reader.tags}
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    for text in HOSTILE[:-1]:
        assert " ".join(text.split()) in reader.texts
    assert f"{'long ' * 60}… (9,999 characters)" in reader.texts
    assert len(page.read_text("utf-8")) < 1_000_000


def test_ids_are_unique_and_nothing_is_loaded(page):
    reader, text = Reader(page), page.read_text("utf-8")
    ids = reader.values("id")
    assert len(set(ids)) == len(ids) > 20
    assert not reader.values("src")
    assert not re.search(r"@import|<base|https?:", text)
    references = reader.values("href") + re.findall(r"url\(([^)]*)\)", text)
    assert {reference.removeprefix("#") for reference in references} <= set(ids)
    assert {reference[0] for reference in references} == {"#"}
    assert {a["href"] for tag, a in reader.tags if tag == "use"}, "markers are drawn by reference"


def test_every_figure_has_words_for_those_who_do_not_see_it(page):
    pictures = [attributes for tag, attributes in Reader(page).tags if tag == "svg"]
    words = [picture["aria-label"] for picture in pictures]
    assert all(len(said) > 40 for said in words)
    assert len(set(words)) == len(words)
    assert {picture["role"] for picture in pictures} == {"img"}


def test_the_same_runs_give_the_same_page(page, work, tmp_path):
    registry.report([work / "runs"], tmp_path / "again.html", data=work / "features.pkl")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_without_the_data_there_are_ids_and_a_word_on_how_to_get_texts(work, tmp_path):
    registry.report([work / "runs"], tmp_path / "page.html")
    texts = Reader(tmp_path / "page.html").texts
    assert any(text.startswith(f"0 {HOSTILE[0]}") for text in texts)
    assert HOSTILE[0] not in texts
    assert [text for text in texts if "--data FILE" in text]


def test_demo_gives_its_texts_and_true_labels(benchmark, work, empty_folder):
    registry.run("mean+ulgm", plugins=[work / "models.py"], config={"epochs": 2})
    code, _, err = benchmark("report", "runs", "--metrics", "Corr")
    assert (code, err.strip()) == (0, "written to report.html")
    texts = Reader(empty_folder / "report.html").texts
    assert {"MAE, Corr by seed", "true audio label", "text label", "by mean+ulgm"} <= set(texts)
    assert "synthetic: shows that the tool works, not which model is better" in texts
    assert len({*generate().splits["test"].raw_text} & {*texts}) >= MOST_WRONG


def test_a_checkpoint_that_was_not_trained_here_has_no_curve(runs, work):
    edit(runs / "mean", "metrics.json", best_epoch=None)
    registry.report([runs], runs / "page.html")
    section = (runs / "page.html").read_text().partition('<section id="learning-curves"')[2].partition("</section>")[0]
    assert re.findall(r"<figcaption>([^ ]*) ", section) == ["mean+heads", "mean+ulgm"]


def test_a_diverged_seed_does_not_flatten_the_curves_of_the_others(runs, work):
    path = next((runs / "mean").rglob("history.csv"))
    table = pd.read_csv(path)
    table.loc[0, "valid_mae"] = 1e6
    table.to_csv(path, index=False)
    registry.report([runs], runs / "page.html")
    assert [text for text in Reader(runs / "page.html").texts if "validation MAE ends at" in text]


def test_classes_are_those_of_the_metrics():
    rng = np.random.default_rng(0)
    truth, predicted = (np.round(rng.uniform(-1.2, 1.2, 400), 1) for _ in range(2))
    for family, metric, scale in (("mosi", "Mult_acc_7", 3), ("sims", f"Mult_acc_{len(SIMS_EDGES) + 2}", 1)):
        pair = [finest_classes(values * scale, family) for values in (truth, predicted)]
        assert np.mean(pair[0] == pair[1]) == regression(predicted * scale, truth * scale, family)[metric]
        assert set(pair[0]) == set(range(len(CLASSES[family])))


# --- many models


def many(folder: Path, runs: Path, models: int, clips: int) -> Path:
    """Make runs of many models, tested on many clips."""
    rng = np.random.default_rng(0)
    labels = np.round(rng.uniform(-3, 3, clips) * 5) / 5
    for number in range(models):
        copy = shutil.copytree(next(runs.rglob("1")), folder / f"model_{number}" / "1")
        edit(copy, "config.json", model=f"model_{number}")
        edit(copy, "metrics.json", lines={})
        predictions = pd.DataFrame({"id": range(clips), "label": labels, "prediction": labels + rng.normal(size=clips)})
        predictions.to_csv(copy / "predictions.csv", index=False)
    return folder


def test_many_clips_are_counted_in_hexagons(runs, tmp_path):
    few, lot = (many(tmp_path / name, runs / "mean", 2, n) for name, n in (("few", 100), ("lot", MOST_POINTS)))
    (small, *_), as_hexagons, _ = scatters(collect([few]))
    (large, *_), as_hexagons_too, _ = scatters(collect([lot]))
    assert (as_hexagons, as_hexagons_too) == (False, True)
    assert len(svg(small, "a")) < 20_000
    assert len(svg(large, "a")) < 65_000


@pytest.mark.slow
def test_forty_models_make_a_page_that_can_be_sent(runs, tmp_path):
    registry.report([many(tmp_path / "many", runs / "mean+ulgm", 40, 2000)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert len(text.encode()) < 10e6
    assert "Columns: the first row and the 7 others with the lowest MAE." in text


# --- pictures


def panel(name: str = "a") -> Panel:
    def draw(made):
        axes = made.add_axes((0.2, 0.2, 0.7, 0.7))
        axes.plot([1, 2], [3, 4], "o")
        axes.set_xlabel(name)

    return Panel(name, "two points", (2, 2), draw)


def test_svg_of_a_page_shares_no_id_and_brings_no_style():
    first, second = (svg(panel(), key) for key in ("a-0", "a-1"))
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', first)) == ids[0]
    assert not re.search("<style|<metadata|xmlns|<!DOCTYPE|<\\?xml", first)


@pytest.mark.parametrize("name", [*HOSTILE, "$x^2$ and $y", "a\x00b\x08\ud800c", 'id="x" href="#y" url(#z)'])
def test_a_models_name_stays_text_in_a_picture(name):
    text = svg(panel(shortened(name, 40)), "key")
    found = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert len(shortened(name, 40)) <= 40
    assert "<script" not in text
    assert "<img" not in text
    assert len(found) >= 3


def test_shortened_keeps_both_ends():
    assert shortened("misa+heads:finetune_text=false", 20) == "misa+heads:f…t=false"
    assert shortened("tfn", 20) == "tfn"


# --- files and the command


def test_figures_for_a_paper(benchmark, work, tmp_path):
    out = ["--out", tmp_path / "page.html", "--figures", tmp_path / "figures"]
    code, _, err = benchmark("report", work / "runs", *out)
    assert code == 0, err
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    names = ["seeds", "learning-curves", "predictions", "confusion", "label-distributions", "label-movement"]
    assert set(files) == {f"{name}.pdf" for name in names}
    assert all(content.startswith(b"%PDF") and b"/Type3" not in content for content in files.values())


@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_figures_of_other_formats(work, tmp_path, form, start):
    registry.report([work / "runs" / "mean"], tmp_path / "page.html", figures=tmp_path, figure_format=form)
    files = [path for path in tmp_path.iterdir() if path.suffix == f".{form}"]
    assert len(files) == 4
    assert all(path.read_bytes().startswith(start) for path in files)


def test_a_broken_run_is_said_and_makes_the_exit_code_1(benchmark, runs, tmp_path):
    next((runs / "mean+ulgm").rglob("predictions.csv")).unlink()
    code, _, err = benchmark("report", runs, "-o", tmp_path / "page.html")
    assert code == 1
    assert "predictions.csv is missing" in err
    texts = Reader(tmp_path / "page.html").texts
    assert "Not all runs are whole." in texts
    assert [text for text in texts if "1 of 2 seeds failed" in text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "--figure-format", "gif"], "unknown figure format 'gif' (available: pdf, png, svg)"),
        (["runs", "--data", "other.pkl"], "--data other.pkl is not of these runs"),
        (["runs", "--data", "none.pkl"], "none.pkl does not exist"),
        (["runs", "--reference", "meen"], "unknown row 'meen', did you mean 'mean'?"),
        (["runs", "--metrics", "Acc"], "unknown metric 'Acc'"),
        (["runs", "--figures", "other.pkl"], "--figures other.pkl is not a folder"),
        (["runs", "-o", "runs"], "--out runs is not a file"),
        (["nowhere"], "nowhere holds no finished run"),
    ],
)
def test_bad_input(benchmark, runs, monkeypatch, arguments, message):
    monkeypatch.chdir(runs.parent)
    feature_file(runs.parent, name="other.pkl", sizes=SIZES)
    code, out, err = benchmark("report", *arguments)
    assert (code, out, err.count("error: ")) == (2, "", 1)
    assert message in err
    assert sorted(path.name for path in runs.parent.iterdir()) == ["other.pkl", "runs"]


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("predictions", lambda t: t.assign(prediction=np.inf), "has predictions or labels that are not finite"),
        ("labels", lambda t: t.drop(columns="fusion"), "the table 'labels' of .* has no column fusion"),
    ],
)
def test_an_edited_table_is_named(runs, table, change, message):
    path = next((runs / "mean+ulgm").rglob(f"{table}.csv"))
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(InputError, match=message):
        registry.report([runs], runs / "page.html")
    assert not (runs / "page.html").exists()


@pytest.mark.parametrize(("table", "column"), [("history", "valid_mae"), ("predictions", "prediction")])
def test_a_table_without_its_numbers_is_said_in_the_row(runs, table, column):
    path = next((runs / "mean+ulgm").rglob(f"{table}.csv"))
    pd.read_csv(path).assign(**{column: "much"}).to_csv(path, index=False)
    comparison = registry.report([runs], runs / "page.html")
    assert [row.name for row in comparison.rows if f"called {column}" in row.note] == ["mean+ulgm"]
    assert f"called {column}" in (runs / "page.html").read_text()


def test_a_run_folder_stays_as_it_is(runs):
    (seed,) = (runs / "mean").rglob("1")
    with pytest.raises(InputError, match="the folder of a run, which stays as it is"):
        registry.report([runs], seed / "report.html")


# --- in a browser


def chromium(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--no-first-run"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


PROBE = """<!doctype html><title>probe</title><iframe id="page" width="390" height="800" srcdoc="{page}"></iframe>
<pre id="found">nothing</pre>
<script>
  document.getElementById("page").onload = event => {{
    const inside = event.target.contentDocument;
    document.getElementById("found").textContent = JSON.stringify({{
      scroll: inside.documentElement.scrollWidth, width: inside.documentElement.clientWidth, title: inside.title,
      tables: [...inside.querySelectorAll(".table")].filter(box => box.scrollWidth > box.clientWidth).length,
    }});
  }};
</script>"""


def probe(page: str, tmp_path: Path) -> dict[str, object]:
    """Return what a window of 390 pixels makes of a page; scripts are allowed in it."""
    import html

    free = re.sub(r"<meta http-equiv[^>]*>", "", page)
    (tmp_path / "probe.html").write_text(PROBE.format(page=html.escape(free)), "utf-8")
    shown = chromium(tmp_path, "--dump-dom", "--virtual-time-budget=5000", f"file://{tmp_path / 'probe.html'}").stdout
    return json.loads(html.unescape(shown.partition('<pre id="found">')[2].partition("</pre>")[0]))


@needs_a_browser
def test_a_phone_scrolls_tables_and_not_the_page(page, tmp_path):
    found = probe(page.read_text("utf-8"), tmp_path)
    assert found["scroll"] <= found["width"] <= 390
    assert found["tables"] > 0
    assert found["title"] == "Models on custom", "no script of a clip has run"


@needs_a_browser
def test_the_probe_sees_a_script_and_a_page_that_is_too_wide(page, tmp_path):
    guilty = page.read_text("utf-8").replace("</footer>", f"</footer>{HOSTILE[0]}<p style='width: 900px'>wide</p>")
    found = probe(guilty, tmp_path)
    assert found["title"] == "owned"
    assert found["scroll"] > found["width"]


@needs_a_browser
def test_a_browser_has_nothing_to_complain_of_and_prints_the_page(page, tmp_path):
    done = chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", f"file://{page}")
    assert "CONSOLE" not in done.stderr
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 40
