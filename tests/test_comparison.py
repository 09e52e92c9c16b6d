"""`compare` and `table`: rows, what they reuse and survive, and every form they are written in."""

from __future__ import annotations

import json
import re
import shutil
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
from registry.side_by_side import of_interest, render, tables_of
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

    def note(self, text):
        self.notes.append(text)

    def failed(self, seed, reason):
        pass

    def start(self, seed, number, config):
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
    from registry import comparison

    def run(model, *arguments, **options):
        if model == "mean":
            raise MemoryError("no room\nfor it")
        return registry.run(model, *arguments, **options)

    monkeypatch.setattr(comparison, "run_model", run)
    made = compare(["mean", "plain"], seeds=(1,))
    assert made.rows[0].note == "failed: MemoryError: no room for it"
    assert "No differences: the first row, mean, has no finished run." not in tables_of(made)[0].caption
    made = compare(["mean", "plain", "mean:batch_size=2", "plain:batch_size=2"], seeds=(1,))
    assert "No differences: the first row, mean, has no finished run." in tables_of(made)[0].caption


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
    assert told.seeds == []
    again = compare(["mean", "mean+heads"], told=told)
    assert [row.mean for row in again.rows] == [rows[0].mean, rows[3].mean]
    assert told.seeds == []  # they were found


def test_a_process_that_dies_is_its_row(compare):
    try:
        note = compare(["killed", "mean"], jobs=2, seeds=(1,)).rows[0].note
    except BenchmarkError as error:  # it took the other one with it
        note = str(error)
    assert "was killed: run the same again with fewer jobs" in note


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
    assert "resample the 12 clips (the data does not tell their videos)" in rows.caption  # ids are all test$_$N
    assert "Holm-corrected over 1 row;" in rows.caption
    assert [row["model"] for row in rows.rows] == ["plain"]


# --- forms


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, plugin) -> Comparison:
    return compare_in(tmp_path_factory.mktemp("made"), plugin, ["mean", "mean:learning_rate=0.5", "half_bad"])


def test_the_best_is_marked(comparison):
    rows = tables_of(comparison)[0].rows
    means = [row.mean for row in comparison.rows]
    for metric, best in (("MAE", min), ("Corr", max), ("Mult_acc_7", max)):
        wanted = best(mean[metric] for mean in means)
        assert [isinstance(row[metric], Best) for row in rows] == [mean[metric] == wanted for mean in means]


def test_captions_say_the_protocol(comparison):
    caption = tables_of(comparison)[0].caption
    for part in (
        "mean ± sample standard deviation over seeds",
        "selection: the epoch with the lowest validation MAE; test is read once",
        "changed settings: batch_size=4, epochs=2, but learning_rate=0.5, batch_size=4, epochs=2 for mean:learning",
        "labels: within ±3",
    ):
        assert part in caption, part


def test_markdown(comparison):
    text = render(comparison, "markdown")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 + 2 + 2  # header, rule and rows, of results and of differences
    assert len({line.replace("\\|", "").count("|") for line in lines[:5]}) == 1
    assert "**" in lines[2] + lines[3]


def test_latex(comparison):
    text = render(comparison, "latex")
    for rule in ("\\toprule", "\\midrule", "\\bottomrule"):
        assert text.count(rule) == 2
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"(?<!\\)[#%](?! needs)", text.replace("% needs", ""))
    assert not re.findall(r"(?<!\\)_", text)
    assert text.isascii()
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
    assert {line.count(" & ") for line in body.splitlines() if line.endswith("\\\\")} == {columns - 1}


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
    assert table["MAE low"][1] <= table["MAE difference"][1] <= table["MAE high"][1]
    assert table["MAE p"][1] == pytest.approx(comparison.differences["mean:learning_rate=0.5"].p_mae)
    assert list(table["seeds"]) == [2, 2, 1]


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
    assert row["the paper"] == "0.9000† [1]"
    assert row["upstream's table"] == "1.0000 [2]"
    assert row["independent re-runs"] == "1.0000 ± 0.0100 [3]"
    assert "[1] a paper; [2] a table; [3] somebody" in table.caption
    assert "[3]: ten seeds" in table.caption
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
    assert code == 0
    assert "| half_bad |" in output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "pdf"], "unknown format 'pdf'"),
        (["--out", "table.txt"], "--out needs --format"),
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
