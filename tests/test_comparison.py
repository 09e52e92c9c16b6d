"""`compare` and `table`: rows, what they reuse and survive, and every form they are written in."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import registry
from registry import BenchmarkError, Comparison, InputError, PublishedResult
from registry.comparison import collect
from registry.forms import render
from registry.side_by_side import of_interest, ranges, tables_of
from registry.statistics import compare_predictions
from registry.tables import Best
from registry.training import Watcher
from tests.helpers import feature_file

QUICK = {"epochs": 2, "batch_size": 4}
SIZES = {"train": 8, "valid": 4, "test": 12}
MODELS = """
import torch
from registry import FusionOutput, register_model


class Mean(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.linear = torch.nn.Linear(data.dims["audio"], 1)
        self.feature_dims = {"audio": 5, "fusion": 5}

    def forward(self, batch):
        mean = batch.audio.sum(1) / batch.audio_lengths[:, None]
        features = {"audio": mean, "fusion": self.linear.weight * mean}
        return FusionOutput(prediction=self.linear(mean).squeeze(-1), features=features)


class Bad(Mean):
    def forward(self, batch):
        if self.training and torch.initial_seed() == SEED:
            raise RuntimeError("it broke")
        return super().forward(batch)


class Featureless(Mean):
    def __init__(self, config, data):
        super().__init__(config, data)
        self.feature_dims = {}

    def forward(self, batch):
        return FusionOutput(prediction=super().forward(batch).prediction)


class Killed(Mean):
    def forward(self, batch):
        import os
        os._exit(3)


SEED = 2
PRESETS = {"paper": {"mosi": {"weight_decay": 0.1}}}
register_model("mean", summary="mean of audio", needs=("audio",), presets=PRESETS)(Mean)
register_model("half_bad", summary="fails in one seed", needs=("audio",))(type("HalfBad", (Bad,), {}))
register_model("killed", summary="dies", needs=("audio",))(Killed)
register_model("plain", summary="no features", needs=("audio",))(Featureless)
register_model("human", summary="needs human labels", needs=("audio", "T"))(type("Human", (Mean,), {}))
"""


def spelled(source: str) -> str:
    """Return the source with its classes at module level, as `--plugin` finds them."""
    for number, call in enumerate(re.findall(r"^register_model.*$", source, re.M)):
        source = source.replace(call, f"M{number} = {call}")
    return source


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("plugin") / "models.py"
    file.write_text(spelled(MODELS))
    return str(file)


class Told(Watcher):
    """Keeps what a comparison says and trains."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.seeds: list[int] = []
        self.epochs: list[tuple[str, int, int]] = []
        self.name = ""

    def beside(self, name):
        of_model = copy.copy(self)  # with the same lists
        of_model.name = name
        return of_model

    def epoch(self, record):
        self.epochs.append((self.name, self.seed, record.epoch))

    def note(self, text):
        self.notes.append(text)

    def failed(self, seed, reason):
        pass

    def start(self, seed, number, config):
        self.seed = seed
        self.seeds.append(seed)


def compare_in(folder: Path, plugin: str, models, *, told=None, config=None, seeds=(1, 2), **options) -> Comparison:
    return registry.compare(
        models,
        "custom",
        data=options.pop("data", None) or feature_file(folder, sizes=SIZES),
        label_range=3.0,
        seeds=seeds,
        config={**QUICK, **(config or {})},
        runs=folder / "runs",
        plugins=[plugin],
        device="cpu",
        watcher=told or Told(),
        **options,
    )


@pytest.fixture
def compare(tmp_path, plugin):
    """Compare models on a small file of audio; arguments as for `registry.compare`."""
    return partial(compare_in, tmp_path, plugin)


# --- rows


def test_rows_are_the_runs(compare):
    comparison = compare(["mean", "mean+heads"])
    assert [row.name for row in comparison.rows] == ["mean", "mean+heads"]
    for row in comparison.rows:
        values = [run.metrics["MAE"] for run in row.runs]
        assert row.mean["MAE"] == pytest.approx(np.mean(values))
        assert row.std["MAE"] == pytest.approx(np.std(values, ddof=1))
        assert (row.parameters, row.text, row.note) == (6, "none", "")
        later = [run.history["train_seconds"].iloc[1] for run in row.runs]
        assert row.seconds_per_epoch == pytest.approx(np.mean(later))
    assert comparison.metrics[:2] == ["MAE", "Corr"]


def test_finished_runs_are_reused(compare):
    first = compare(["mean"])
    told = Told()
    again = compare(["plain", "mean"], told=told, seeds=(1, 2, 3))
    assert told.seeds == [1, 2, 3, 3]
    assert again.rows[1].runs[0].folder == first.rows[0].runs[0].folder
    assert len([note for note in told.notes if "finished already" in note]) == 1


def test_one_model_s_failure_is_its_row(compare):
    comparison = compare(["human", "half_bad", "mean"])
    human, half_bad, mean = comparison.rows
    assert human.note.startswith("failed: human needs labels 'T'")
    assert human.runs == ()
    assert half_bad.note == "1 of 2 seeds failed: RuntimeError: it broke"
    assert [run.settings["seed"] for run in half_bad.runs] == [1]
    assert mean.note == ""
    assert comparison.reference is None
    assert comparison.differences == {}
    notes = [row["note"] for row in tables_of(comparison)[0].rows]
    assert notes == [human.note, half_bad.note, ""]


def test_nothing_that_can_be_trained(compare):
    with pytest.raises(InputError, match="no model could be trained: human needs labels"):
        compare(["human"])


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["mean", "meen"], {}, "unknown model 'meen', did you mean 'mean'"),
        (["mean,,plain"], {}, "--models takes names with commas"),
        (["mean,mean"], {}, "--models names 'mean' twice"),
        (["mean", "plain"], {"config": {"learning_rat": 1}}, "unknown key 'learning_rat'.*none of the models has it"),
        (["mean:batch_size=none"], {}, "mean:batch_size=none: config of mean: 'batch_size' must be an integer"),
        (["mean:learning_rat=1"], {}, "unknown key 'learning_rat'"),
        (["mean:fast"], {}, "takes KEY=VALUE, got 'fast'"),
        (["mean+heads+ulgm"], {}, "cannot"),
        (["all:batch_size=2"], {}, "all takes no settings and no hooks"),
        (["mean"], {"preset": "papr"}, "unknown preset 'papr', did you mean 'paper'"),
        (["mean"], {"seeds": ()}, "seeds must be"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_trained(compare, tmp_path, models, options, message):
    with pytest.raises(InputError, match=message):
        compare(models, **options)
    assert not (tmp_path / "runs").exists()


def test_settings_of_one_row(compare):
    comparison = compare(["mean", "mean:learning_rate=0.5:weight_decay=0.01"])
    first, second = (row.runs[0].settings["config"] for row in comparison.rows)
    assert (first["learning_rate"], second["learning_rate"], second["weight_decay"]) == (1e-3, 0.5, 0.01)
    assert comparison.rows[1].model == "mean"


def test_shared_settings_go_to_the_models_that_have_them(compare):
    told = Told()
    comparison = compare(["mean", "mean+heads"], told=told, config={"hook.head_dims.audio": 4})
    assert comparison.rows[1].runs[0].settings["config"]["hook.head_dims"]["audio"] == 4
    assert "--set hook.head_dims.audio does not apply to mean" in told.notes
    assert not any("batch_size" in note for note in told.notes)


def test_a_list_as_a_setting(compare):
    with pytest.raises(InputError, match="unknown key 'modalities'"):
        compare(["mean:modalities=text,audio:batch_size=2,plain"])


def test_hooks_are_added_beside_settings(compare):
    comparison = compare(["mean+heads,mean:batch_size=2"], also_with=["heads"], seeds=(1,))
    assert [row.name for row in comparison.rows] == ["mean+heads", "mean:batch_size=2", "mean+heads:batch_size=2"]


def test_any_failure_of_a_model_is_its_row(compare, monkeypatch):
    from registry import parallel

    def run(model, *arguments, **options):
        if model == "mean":
            raise MemoryError("no room\nfor it")
        return registry.run(model, *arguments, **options)

    monkeypatch.setattr(parallel, "run_model", run)
    made = compare(["mean", "plain"], seeds=(1,))
    assert made.rows[0].note == "failed: MemoryError: no room for it"
    assert tables_of(made)[0].notes[-1] == "No differences: the first row, mean, has no finished run."


def test_one_reason_of_several_models_is_said_once(compare, tmp_path):
    told = Told()
    data = tmp_path / "broken.pkl"
    data.write_bytes(b"no pickle")
    with pytest.raises(InputError, match=r"no model could be trained: .*broken\.pkl"):
        compare(["mean", "plain"], told=told, data=data)
    assert told.notes[1:] == ["plain failed as mean did"]


def test_a_preset_goes_to_the_models_that_have_it(compare):
    told = Told()
    comparison = compare(["mean", "plain"], told=told, preset="paper")
    assert [row.runs[0].settings["config"]["weight_decay"] for row in comparison.rows] == [0.1, 0.0]
    assert "there is no preset paper for plain: their own default is used" in told.notes


def test_hooks_are_added_where_the_model_takes_them(compare):
    told = Told()
    comparison = compare(["mean", "plain"], told=told, also_with=["heads", "ulgm"], seeds=(1,))
    assert [row.name for row in comparison.rows] == ["mean", "mean+heads", "mean+ulgm", "plain"]
    assert any(note.startswith("plain+heads is left out: the hook 'heads' needs a model") for note in told.notes)


def test_all_is_every_model_that_is_not_named(compare, monkeypatch):
    from registry import plugins

    everything = plugins.Plugins.check

    def few(self, kind):
        return [pair for pair in everything(self, kind) if pair[0].name in ("mean", "plain", "human")]

    monkeypatch.setattr(plugins.Plugins, "check", few)
    comparison = compare(["plain", "mean:batch_size=2", "all"], seeds=(1,))
    assert [row.name for row in comparison.rows] == ["plain", "mean:batch_size=2", "human"]


def test_several_at_once_are_the_same_rows(compare, tmp_path):
    told = Told()
    rows = compare(["mean", "half_bad", "human", "mean+heads"], told=told, jobs=2).rows
    assert [row.name for row in rows] == ["mean", "half_bad", "human", "mean+heads"]
    assert [row.note for row in rows][1] == "1 of 2 seeds failed: RuntimeError: it broke"
    assert rows[2].reason.startswith("human needs labels 'T'")
    assert any(note.startswith("human failed: human needs labels 'T'") for note in told.notes)
    assert sorted(told.seeds) == [1, 1, 1, 2, 2, 2]
    assert ("mean", 2, 2) in told.epochs  # model, seed, epoch
    told.seeds.clear()
    again = compare(["mean", "mean+heads"], told=told)
    assert [row.mean for row in again.rows] == [rows[0].mean, rows[3].mean]
    assert told.seeds == []  # they were found


def test_a_process_that_dies_is_its_row(compare):
    try:
        note = compare(["killed", "mean"], jobs=2, seeds=(1,)).rows[0].note
    except BenchmarkError as error:  # it took the other one with it
        note = str(error)
    assert "was killed: run the same again with fewer jobs" in note


SCRIPT = """
import registry, sys
if __name__ == "__main__":
    registry.compare(
        ["slow", "mean"], "custom", data=sys.argv[1], label_range=3.0, runs=sys.argv[2], plugins=[sys.argv[3]], jobs=2,
        device="cpu",
    )
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(tmp_path, plugin, sign):
    source = Path(plugin).read_text() + spelled(SLOW)
    (tmp_path / "slow.py").write_text(source)
    (tmp_path / "script.py").write_text(SCRIPT)
    given = [feature_file(tmp_path, sizes=SIZES), tmp_path / "runs", tmp_path / "slow.py"]
    parent = subprocess.Popen([sys.executable, "script.py", *map(str, given)], cwd=tmp_path, stderr=subprocess.DEVNULL)
    mark = tmp_path / "pid"
    until(lambda: mark.exists() and mark.read_text())
    worker = Path(f"/proc/{mark.read_text()}")
    assert worker.exists()
    parent.send_signal(sign)
    parent.wait(timeout=30)
    until(lambda: not worker.exists())
    hidden = [path.name for path in (tmp_path / "runs").rglob(".*.*")]
    assert all(name.endswith(".unfinished") for name in hidden)  # nothing half-written


SLOW = """
class Slow(Mean):
    def forward(self, batch):
        import os, pathlib, time
        (pathlib.Path(__file__).parent / "pid").write_text(str(os.getpid()))
        time.sleep(0.1)
        return super().forward(batch)


register_model("slow", summary="takes its time", needs=("audio",))(Slow)
"""


def until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_no_jobs_at_all(compare):
    with pytest.raises(InputError, match="--jobs must be at least 1, got 0"):
        compare(["mean"], jobs=0)


def test_a_note_is_said_once(compare):
    told = Told()
    compare(["mean", "plain"], told=told)
    assert len(told.notes) == len(set(told.notes))


# --- differences


def test_differences_are_the_statistics_of_the_predictions(compare):
    comparison = compare(["mean", "plain", "mean:learning_rate=0.5"])
    tables = {row.name: [run.predictions for run in row.runs] for row in comparison.rows}
    expected = compare_predictions(
        tables["mean"][0]["label"],
        {name: np.stack([table["prediction"] for table in of_row]) for name, of_row in tables.items()},
        list(tables["mean"][0]["id"]),
        "mosi",
        reference="mean",
    )
    assert comparison.differences == expected
    found = comparison.differences["mean:learning_rate=0.5"].mean["MAE"]
    assert found == pytest.approx(comparison.rows[2].mean["MAE"] - comparison.rows[0].mean["MAE"])


def test_the_caption_counts_videos_and_rows(compare):
    rows = tables_of(compare(["mean", "plain"]))[1]
    caption = " ".join(rows.notes)
    assert "resample the 12 clips (the data does not tell their videos)" in caption  # ids are all test$_$N
    assert "Holm-corrected over 1 row;" in caption
    assert [row["model"] for row in rows.rows] == ["plain"]


# --- forms


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, plugin) -> Comparison:
    return compare_in(tmp_path_factory.mktemp("made"), plugin, ["mean", "mean:learning_rate=0.5", "half_bad"])


def test_the_best_is_marked(comparison):
    rows = tables_of(comparison)[0].rows
    means = [row.mean for row in comparison.rows[:2]]  # the third has one seed only
    for metric, best in (("MAE", min), ("Corr", max), ("Mult_acc_7", max)):
        wanted = best(mean[metric] for mean in means)
        assert [isinstance(row[metric], Best) for row in rows] == [*(mean[metric] == wanted for mean in means), False]


def test_captions_say_the_protocol(comparison):
    notes = tables_of(comparison)[0].notes
    for note in (
        "Test split of custom: mean ± sample standard deviation over seeds, which are not the same in all rows.",
        "The best mean of a metric is bold, of rows with more than one seed.",
        "Selection: the epoch with the lowest validation MAE; test is read once.",
        "Changed settings: learning_rate=0.5, batch_size=4, epochs=2 for mean:learning_rate=0.5; "
        "batch_size=4, epochs=2 for all others.",
        "Labels: within ±3.",
    ):
        assert note in notes
    assert not any("there are none" in note for note in notes)
    assert [row["seeds"] for row in tables_of(comparison)[0].rows] == ["1-2", "1-2", "1"]
    caption = " ".join(tables_of(comparison)[1].notes)
    assert "One seed only, so that an interval leaves training out and there is no p: half_bad." in caption
    assert [row["p"] == "–" for row in tables_of(comparison)[1].rows] == [False, True]


def test_ranges_of_seeds():
    assert [ranges(seeds) for seeds in ([], [5], [3, 1, 2], [1, 3, 4, 9])] == ["", "5", "1-3", "1, 3-4, 9"]


def test_few_clips_have_no_intervals(compare, tmp_path):
    few = feature_file(tmp_path, name="few.pkl", sizes={"train": 8, "valid": 4, "test": 9})
    table = tables_of(compare(["mean", "plain"], data=few))[1]
    assert table.notes[-1] == "No intervals and no p: the test split has 9 videos, fewer than 10."
    assert [(row["p"], "[" in row["MAE"]) for row in table.rows] == [("–", False)]


def test_metrics_that_are_chosen(compare):
    made = compare(["mean", "plain"], metrics=["Non0_acc_2", "Corr"])
    assert made.metrics == ["MAE", "Non0_acc_2", "Corr"]
    assert list(tables_of(made)[1].rows[0]) == ["model", "MAE", "p", "Non0_acc_2", "Corr"]
    assert "Mult_acc_7" not in made.frame()
    with pytest.raises(InputError, match="unknown metric 'F1_score', did you mean 'Non0_F1_score'"):
        compare(["mean"], metrics=["F1_score"])


# --- what a hook adds


def test_what_a_hook_adds_is_measured_against_its_control(compare):
    made = compare(["mean", "mean+heads", "mean+ulgm", "mean+ulgm:batch_size=2"], config={"epochs": 3})
    assert made.controls == {"mean+ulgm": ("ulgm", "mean+heads")}
    tables = {row.name: np.stack([run.predictions["prediction"] for run in row.runs]) for row in made.rows}
    truth = made.rows[0].runs[0].predictions
    expected = compare_predictions(
        truth["label"], tables, list(truth["id"]), "mosi", reference={"mean+ulgm": "mean+heads"}
    )
    assert made.effects == expected
    table = tables_of(made)[2]
    assert table.title == "what ulgm adds"
    assert [row["model"] for row in table.rows] == ["mean+ulgm − mean+heads"]
    assert table.notes[0].startswith("A model with ulgm minus its control on the test split.")
    effect = json.loads(render(made, "json"))[2]["effect"]
    assert (effect["control"], effect["p_mae"]) == ("mean+heads", made.effects["mean+ulgm"].p_mae)
    assert made.frame()["MAE effect"].notna().tolist() == [False, False, True, False]


def test_the_control_of_a_model_that_always_has_the_hook(tmp_path, encoder):
    data = feature_file(tmp_path, sizes=SIZES)
    given = {"data": data, "text_encoder": encoder, "label_range": 3.0, "seeds": (1, 2), "config": QUICK}
    control = "self_mm:supervision=multimodal"
    made = registry.compare(["self_mm", control], "custom", runs=tmp_path / "runs", watcher=Told(), **given)
    assert made.controls == {"self_mm": ("ulgm", control)}
    assert [row["model"] for row in tables_of(made)[2].rows] == [f"self_mm − {control}"]
    assert made.effects["self_mm"].mean["MAE"] == pytest.approx(-made.differences[control].mean["MAE"])


def test_a_chosen_epoch_that_no_generated_label_had_reached(compare):
    told = Told()
    made = compare(["mean", "mean+ulgm"], told=told)  # 2 epochs: labels move in the second one
    assert [run.settings["seed"] for run in made.rows[1].generated_in_vain] == [1, 2]
    assert any(note.endswith("no generated one had moved before it") for note in told.notes)
    note = (
        "No generated label had moved before the chosen epoch, which has seen human labels only: mean+ulgm (seed 1-2)."
    )
    assert note in tables_of(made)[0].notes
    later = compare(["mean+ulgm"], config={"epochs": 4, "learning_rate": 0.01}, seeds=(1,))
    assert later.rows[0].runs[0].best_epoch > 2
    assert later.rows[0].generated_in_vain == []


def test_markdown(comparison):
    text = render(comparison, "markdown")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 + 2 + 2  # header, rule and rows, of results and of differences
    assert len({line.replace("\\|", "").count("|") for line in lines[:5]}) == 1
    assert "**" in lines[2] + lines[3]


def test_latex(comparison):
    text = render(comparison, "latex", name="my table")
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 2
    assert re.findall(r"\\label\{(.*)\}", text) == [
        "tab:my-table-results-on-custom",
        "tab:my-table-differences-from-mean",
    ]
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"(?<!\\)[#%](?! needs)", text.replace("% needs", ""))
    assert not re.findall(r"(?<!\\)_", text)
    assert not re.search(r"[\s{\[]-\d", text)  # a minus is set as one
    assert text.isascii()
    for tabular in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.S):
        columns = len(re.sub(r"p\{.*?\}\}?", "p", re.search(r"\{tabular\}\{(.*)\}\n", tabular)[1]))
        assert {line.count(" & ") for line in tabular.splitlines() if line.endswith("\\\\")} == {columns - 1}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_within_the_text_s_width(comparison, tmp_path):
    published = [result(source="somebody's paper", second_hand=True, note="ten seeds, 50 % more")]
    tables = render(comparison, "latex", published)
    source = f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{tables}\n\\end{{document}}"
    (tmp_path / "table.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")[-2000:]
    assert not re.findall(r"Overfull \\hbox.*", (tmp_path / "table.log").read_text("latin-1"))


def test_a_wide_table_is_split_and_a_long_one_fills_several_floats(comparison):
    rows = [*comparison.rows, *(replace(comparison.rows[0], name=f"row {number}") for number in range(30))]
    text = render(replace(comparison, rows=rows), "latex")
    floats = text.split("\\begin{table}")[1:]
    assert [("continued" in part, part.count("\\toprule")) for part in floats[:2]] == [(False, 1), (True, 1)]
    assert text.count("\\label{tab:results-on-custom}") == 1


def test_html(comparison):
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.tags = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(render(comparison, "html"))
    assert reader.open == []
    assert sum(tag == "table" for tag, _ in reader.tags) == 2
    assert not any({"src", "href"} & attributes.keys() for _, attributes in reader.tags)


def test_html_escapes(compare, monkeypatch):
    comparison = compare(["mean"])
    monkeypatch.setattr(type(comparison.rows[0]), "note", "<script>")
    assert "<script>" not in render(comparison, "html")
    assert "&lt;script&gt;" in render(comparison, "html")


def test_csv_has_every_figure_in_full(comparison):
    table = pd.read_csv(StringIO(render(comparison, "csv")))
    assert list(table["model"]) == ["mean", "mean:learning_rate=0.5", "half_bad"]
    assert table["MAE"][1] == pytest.approx(comparison.rows[1].mean["MAE"], abs=1e-12)
    assert table["MAE difference low"][1] <= table["MAE difference"][1] <= table["MAE difference high"][1]
    assert table["MAE difference p"][1] == pytest.approx(comparison.differences["mean:learning_rate=0.5"].p_mae)
    assert list(table["seeds"]) == [2, 2, 1]
    assert list(table["which seeds"]) == ["1,2", "1,2", "1"]


def test_json_is_a_list_of_results(comparison):
    rows = json.loads(render(comparison, "json"))
    alone = json.loads(comparison.rows[0].result.to_json())
    assert {key: rows[0][key] for key in ("model", "runs", "mean", "std", "folder")} == {
        key: alone[key] for key in ("model", "runs", "mean", "std", "folder")
    }
    assert rows[2]["runs"][1]["status"] == "failed"
    assert rows[2]["std"] is None
    assert rows[1]["difference"]["p_mae"] == comparison.differences["mean:learning_rate=0.5"].p_mae


def test_what_latex_cannot_set_as_it_is(compare, monkeypatch):
    comparison = compare(["mean"], seeds=(1,))
    monkeypatch.setattr(type(comparison.rows[0]), "note", "--set a_b=50% & 2² − |x| #1 ~ C:\\x {y}")
    text = render(comparison, "latex")
    assert r"-{}-set a\_b=50\% \& 2$^2$ $-$ \textbar{}x\textbar{} \#1 \textasciitilde{} C:" in text
    assert "xelatex" not in text
    monkeypatch.setattr(type(comparison.rows[0]), "note", "情感")
    assert "compile with xelatex" in render(comparison, "latex")


def test_an_unknown_form(comparison):
    with pytest.raises(InputError, match="unknown format 'latx', did you mean 'latex'"):
        render(comparison, "latx")


# --- published results


def result(**changes) -> PublishedResult:
    fields = {"source": "a table", "kind": "upstream", "dataset": "custom", "model": "mean", "metrics": {"MAE": 1.0}}
    return PublishedResult(**{**fields, **changes})


def test_published_figures_name_their_sources(comparison):
    of_paper = result(source="a paper", kind="paper", second_hand=True, metrics={"MAE": 0.9, "Corr": 0.5})
    repeated = result(source="somebody", kind="re-run", std={"MAE": 0.01}, note="ten seeds")
    table = tables_of(comparison, [of_paper, result(), repeated])[-1]
    row = next(row for row in table.rows if (row["model"], row["metric"]) == ("mean", "MAE"))
    assert row["papers"] == "0.9000† [1]"
    assert row["upstream's table"] == "1.0000 [2]"
    assert row["independent re-runs"] == "1.0000 ± 0.0100 [3]"
    assert table.notes[-4:] == ["[1] a paper.", "[2] a table.", "[3] somebody.", "On [3]: ten seeds."]
    assert [row["metric"] for row in table.rows if row["model"] == "mean"] == ["MAE", "Corr"]


def test_a_gap_only_where_all_agrees(comparison, monkeypatch):
    row = comparison.rows[0]
    known = {"data_setting": "unaligned", "text_encoder": "BERT-base, frozen"}
    monkeypatch.setitem(row.protocol, "text encoder", "bert-base-uncased, frozen")
    assert [r["gap"] for r in tables_of(comparison, [result(**known)])[-1].rows if r["model"] == "mean"] == ["–"]
    monkeypatch.setitem(row.protocol, "changed settings", "none")
    others = [
        {"text_encoder": "BERT-base, frozen"},
        {"data_setting": "unaligned"},
        {**known, "text_encoder": "BERT-base, fine-tuned"},
        {**known, "data_setting": "aligned"},
    ]
    assert {r["gap"] for other in others for r in tables_of(comparison, [result(**other)])[-1].rows} == {"–"}
    gap = next(r["gap"] for r in tables_of(comparison, [result(**known)])[-1].rows if r["model"] == "mean")
    standard_error = row.std["MAE"] / 2**0.5
    assert gap == f"{(row.mean['MAE'] - 1.0) / standard_error:+.1f} [1]"
    spread = {"std": {"MAE": 0.3}, "seeds": 9}
    gap = next(r["gap"] for r in tables_of(comparison, [result(**known, **spread)])[-1].rows if r["model"] == "mean")
    assert gap == f"{(row.mean['MAE'] - 1.0) / (standard_error**2 + 0.01) ** 0.5:+.1f} [1]"


def test_results_of_other_models_datasets_and_tasks_stay_out(comparison):
    others = [{"model": "tfn"}, {"dataset": "mosi"}, {"task": "classification"}]
    others.append({"metrics": {"Acc_2": 0.8}})
    assert of_interest(comparison, [result(), *(result(**other) for other in others)]) == [result()]


def test_a_row_with_a_hook_is_not_what_was_published(compare):
    assert of_interest(compare(["mean+heads"], seeds=(1,)), [result()]) == []


def test_published_results_in_csv_and_json(comparison):
    found = [result(std={"MAE": 0.1}, seeds=5)]
    table = pd.read_csv(StringIO(render(comparison, "csv", found)))
    assert table.iloc[-1][["source", "model", "MAE", "MAE sd"]].tolist() == ["a table", "mean", 1.0, 0.1]
    rows = json.loads(render(comparison, "json", found))
    assert rows[0]["published"][0]["metrics"] == {"MAE": 1.0}
    assert rows[2]["published"] == []


# --- runs that exist


def test_collect_finds_what_lies_below(compare, tmp_path):
    made = compare(["mean", "mean:learning_rate=0.5", "plain"])
    found = collect([tmp_path / "runs"])
    assert {row.name for row in found.rows} == {
        "mean:batch_size=4:epochs=2",
        "mean:learning_rate=0.5:batch_size=4:epochs=2",
        "plain",
    }
    assert sorted(row.mean["MAE"] for row in found.rows) == sorted(row.mean["MAE"] for row in made.rows)
    one = collect([made.rows[0].runs[1].folder, made.rows[2].runs[0].folder.parent])
    assert [(row.name, len(row.runs)) for row in one.rows] == [("mean", 1), ("plain", 2)]
    again = collect([made.rows[0].runs[1].folder, made.rows[0].runs[1].folder.parent])
    assert [len(row.runs) for row in again.rows] == [2]


def test_seeds_of_several_places_make_one_row(compare, tmp_path):
    made = compare(["mean"], seeds=(1, 2, 3))
    there = made.rows[0].runs[0].folder.parent.relative_to(tmp_path)
    for place, seeds in (("a", "12"), ("b", "23")):
        for seed in seeds:
            shutil.copytree(tmp_path / there / seed, tmp_path / place / there / seed)
    found = collect([tmp_path / "a", tmp_path / "b"])
    assert [(row.name, [run.settings["seed"] for run in row.runs]) for row in found.rows] == [("mean", [1, 2, 3])]


def test_an_imported_checkpoint_is_a_row_of_its_own(compare, tmp_path):
    """It lies beside the seeds of its configuration, and has none."""
    folder = compare(["mean"]).rows[0].runs[0].folder
    imported = folder.with_name("imported-abc")
    shutil.copytree(folder, imported)
    (imported / "history.csv").unlink()
    for name, changes in (("config", {"seed": None}), ("metrics", {"best_epoch": None})):
        file = imported / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    found = collect([tmp_path / "runs"])
    assert sorted(len(row.runs) for row in found.rows) == [1, 2]
    assert next(row for row in found.rows if len(row.runs) == 1).seconds_per_epoch is None
    for form in ("markdown", "json", "csv", "latex", "html"):
        assert render(found, form)


def test_collect_takes_a_reference(compare, tmp_path):
    compare(["mean", "plain"])
    assert collect([tmp_path / "runs"], reference="plain").reference.name == "plain"
    with pytest.raises(InputError, match="unknown row 'plein', did you mean 'plain'"):
        collect([tmp_path / "runs"], reference="plein")


def test_a_control_is_one_by_its_settings_and_not_by_its_name(compare, tmp_path):
    more = {"weight_decay": 0.1}
    compare(["mean+ulgm", "mean+heads"], seeds=(1,), config=more)
    compare(["mean+heads"], seeds=(1,))
    found = collect([tmp_path / "runs"])
    own = next(row for row in found.rows if row.name == "mean+ulgm")
    (control,) = [row for row in found.rows if row.name == found.controls["mean+ulgm"][1]]
    assert own.runs[0].settings["config"]["weight_decay"] == control.runs[0].settings["config"]["weight_decay"] == 0.1
    shutil.rmtree(control.runs[0].folder)
    assert collect([tmp_path / "runs"]).effects == {}


def test_a_configuration_is_one_by_what_it_says_and_not_by_where_it_lies(compare, tmp_path):
    made = compare(["mean", "mean:batch_size=2"], seeds=(1, 2))
    first, second = (row.runs for row in made.rows)
    for number, run in enumerate([*first, second[0]]):
        shutil.copytree(run.folder, tmp_path / "moved" / str(number) / "it")
    (tmp_path / "moved/0/3.failed.log").write_text("it broke\n")
    found = collect([tmp_path / "moved"])
    assert sorted((row.seeds, row.note) for row in found.rows) == [([1], ""), ([1, 2], "1 of 3 seeds failed: it broke")]


def test_files_of_the_user_are_no_run(compare, tmp_path):
    compare(["mean"], seeds=(1,))
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/notes/predictions.csv").write_text("mine")
    assert [row.name for row in collect([tmp_path / "runs"]).rows] == ["mean"]


def test_a_reference_that_failed_is_no_reference(compare, tmp_path):
    compare(["half_bad", "mean"], seeds=(2,))
    with pytest.raises(InputError, match="the row 'half_bad' has no finished run: 1 of 1 seeds failed: RuntimeError"):
        collect([tmp_path / "runs"], reference="half_bad")


def test_clips_of_one_video_are_one(compare, tmp_path, monkeypatch):
    made = compare(["mean", "plain"])
    table = made.rows[0].runs[0].predictions
    monkeypatch.setattr(
        type(made.rows[0].runs[0]), "predictions", table.assign(id=[f"film$_${i}" for i in table.index])
    )
    assert set(made.videos) == {"film"}
    assert "the test split has 1 video, fewer than 10" in " ".join(tables_of(made)[1].notes)


def test_captions_of_one_seed_and_of_none(compare):
    made = compare(["mean"], seeds=(7,))
    assert tables_of(made)[0].notes[0] == "Test split of custom, seed 7."


def test_markdown_escapes(compare, monkeypatch):
    comparison = compare(["mean"], seeds=(1,))
    monkeypatch.setattr(type(comparison.rows[0]), "note", "__init__() of a_b `x` [1](2) -3 \\ \udce9")
    text = render(comparison, "markdown")
    assert r"\_\_init\_\_() of a_b \`x\` \[1\](2) -3 \\ " in text


def test_collect_finds_a_row_by_its_model(compare, tmp_path):
    compare(["mean", "mean:learning_rate=0.5", "plain:batch_size=2"])
    assert collect([tmp_path / "runs"], reference="plain").reference.name == "plain"
    with pytest.raises(InputError, match="several rows have the model 'mean'"):
        collect([tmp_path / "runs"], reference="mean")


def test_a_model_stands_before_the_same_with_a_hook(compare, tmp_path):
    compare(["mean+ulgm", "mean+heads", "mean"], seeds=(1,))
    found = collect([tmp_path / "runs"])
    assert [row.name for row in found.rows] == ["mean", "mean+heads", "mean+ulgm"]
    assert found.controls == {"mean+ulgm": ("ulgm", "mean+heads")}


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "predictions.csv", "model.safetensors", "history.csv"])
def test_a_broken_run_is_said_in_its_row(compare, tmp_path, name):
    made = compare(["mean", "plain"])
    file = made.rows[0].runs[0].folder / name
    file.write_bytes(file.read_bytes()[:-9])
    found = collect([tmp_path / "runs"])
    row = next(row for row in found.rows if row.name == "mean")
    assert row.note.startswith(f"1 of 2 seeds failed: {file.parent}: {name} ")
    assert row.seeds == [2]
    file.unlink()
    assert f"{name} is missing" in next(row for row in collect([tmp_path / "runs"]).rows if row.name == "mean").note


def test_a_broken_run_is_trained_again_and_that_is_said(compare):
    first = compare(["mean"])
    file = first.rows[0].runs[1].folder / "predictions.csv"
    file.write_text("id,label")
    told = Told()
    again = compare(["mean"], told=told)
    assert (
        f"{file.parent} is trained again: predictions.csv is broken: it has 0 lines, and was written with 13"
        in told.notes
    )
    assert told.seeds == [2]
    assert again.rows[0].mean == first.rows[0].mean


def test_what_failed_and_what_is_broken_is_a_row_too(compare, tmp_path):
    compare(["half_bad", "mean"], seeds=(1,))
    assert compare(["half_bad:batch_size=2"], seeds=(2,)).rows[0].runs == []
    found = collect([tmp_path / "runs"])
    notes = {row.name: row.note for row in found.rows}
    assert list(notes)[:2] == ["half_bad:batch_size=4:epochs=2", "mean"]
    assert [*notes.values()] == ["", "", "1 of 1 seeds failed: RuntimeError: it broke"]
    assert list(notes)[2].startswith("half_bad:")
    assert found.rows[2].runs == []
    for form in ("markdown", "json", "csv", "latex", "html"):
        assert "it broke" in render(found, form)


def test_collect_asks_for_one_dataset_of_several(compare, tmp_path):
    run = compare(["mean"], seeds=(1,)).rows[0].runs[0]
    settings = json.loads((run.folder / "config.json").read_text())
    other = shutil.copytree(run.folder, tmp_path / "runs/mean/mosei" / run.folder.parent.name / "1")
    (other / "config.json").write_text(json.dumps({**settings, "dataset": "mosei"}))
    with pytest.raises(InputError, match="these are runs on custom, mosei: choose one with --dataset"):
        collect([tmp_path / "runs"])
    assert collect([tmp_path / "runs"], dataset="mosei").rows[0].runs[0].folder == other
    with pytest.raises(InputError, match="unknown dataset 'mosi', did you mean 'mosei'"):
        collect([tmp_path / "runs"], dataset="mosi")


def test_collect_refuses_other_clips(compare, tmp_path):
    compare(["mean"])
    other = feature_file(tmp_path, name="other.pkl", sizes={"train": 8, "valid": 4, "test": 6})
    compare(["plain"], data=other)
    with pytest.raises(InputError, match="were tested on different clips or labels"):
        collect([tmp_path / "runs"])


def test_collect_without_runs(tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        collect([tmp_path])


# --- the commands


def arguments(tmp_path: Path, plugin: str, *more: str) -> list[str]:
    data = feature_file(tmp_path, sizes=SIZES)
    given = ["--dataset", "custom", "--data", data, "--label-range", "3", "--plugin", plugin, "--seeds", "1,2"]
    return [*map(str, given), "--epochs", "2", "--runs", str(tmp_path / "runs"), *more]


def test_the_command_prints_tables(benchmark, tmp_path, plugin):
    code, output, errors = benchmark("compare", "--models", "mean,plain", *arguments(tmp_path, plugin))
    assert code == 0, errors
    assert "results on custom" in output
    assert "differences from mean" in output
    assert "model 2 of 2: plain" in errors
    assert max(map(len, output.splitlines())) <= 120, output


def test_the_command_prints_json_alone(benchmark, tmp_path, plugin):
    code, output, _ = benchmark("compare", "-m", "mean", "-m", "plain", *arguments(tmp_path, plugin, "-f", "json"))
    assert code == 0
    assert [row["model"] for row in json.loads(output)] == ["mean", "plain"]


def test_the_command_writes_a_file(benchmark, tmp_path, plugin):
    target = tmp_path / "table.md"
    more = ["--format", "markdown", "--out", target]
    code, output, errors = benchmark("compare", "-m", "mean,half_bad", *arguments(tmp_path, plugin, *map(str, more)))
    assert (code, output) == (1, "")  # a seed failed
    assert "written to" in errors
    assert "| half_bad |" in target.read_text("utf-8")
    code, output, _ = benchmark("table", tmp_path / "runs", "--format", "markdown")
    assert code == 1
    assert "1 of 2 seeds failed: RuntimeError: it broke" in output


def test_a_file_s_name_says_its_format(benchmark, tmp_path, plugin):
    target = tmp_path / "table.HTML"
    code, _, errors = benchmark("compare", "-m", "mean", *arguments(tmp_path, plugin, "--out", str(target)))
    assert code == 0, errors
    assert target.read_text("utf-8").startswith("<!doctype html>")


def test_metrics_on_the_command_line(benchmark, tmp_path, plugin):
    more = ["--metrics", "Corr, Mult_acc_7", "-f", "csv"]
    code, output, errors = benchmark("compare", "-m", "mean,plain", *arguments(tmp_path, plugin, *more))
    assert code == 0, errors
    assert "Mult_acc_5" not in output
    code, output, _ = benchmark("table", tmp_path / "runs", "--metrics", "Corr", "-f", "csv", "--reference", "plain")
    assert code == 0
    assert [line.partition(",")[0] for line in output.splitlines()] == ["model", "plain", "mean"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "pdf"], "unknown format 'pdf'"),
        (["--out", "table.txt"], "--out needs --format"),
        (["--out", "table.md", "--format", "table"], "--out needs --format"),
        (["--metrics", "Mult_acc_3"], "unknown metric 'Mult_acc_3', did you mean"),
        (["--format", "html", "--out", "nowhere/table.html"], "in a folder that does not exist"),
        (["--set", "epochs=3"], "--epochs and --set epochs"),
        (["--with", "heads,"], "unknown hook ''"),
    ],
)
def test_a_command_that_cannot_end_well_trains_nothing(benchmark, empty_folder, tmp_path, plugin, more, message):
    code, _, errors = benchmark("compare", "-m", "mean", *arguments(tmp_path, plugin, *more))
    assert code == 2
    assert message in errors
    assert not (tmp_path / "runs").exists()


def test_published_results_on_the_command_line(benchmark, tmp_path, plugin):
    code, output, errors = benchmark("compare", "-m", "mean", *arguments(tmp_path, plugin, "--published"))
    assert code == 0
    assert "nothing is published of these models on custom" in errors
    assert "published results" not in output
