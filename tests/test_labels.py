"""What generated labels did: the hook's tables on hand-computed numbers, and `benchmark labels`."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import registry
from registry import Batch, FusionOutput, InputError, TrainingData, load_run
from registry.labels import draw, find_runs, read_labels, write_files
from selfmm_plugin.supervision import HeadsConfig, UlgmConfig, UlgmHook, heads_hook
from tests.helpers import feature_file
from tests.test_benchmark import human_labels, with_features
from tests.test_network import info

HUMAN = torch.tensor([1.0, -1.0, 0.0, 2.0])
TRUE = torch.tensor([1.0, 1.0, -1.0, -1.0])


def hook(labels: dict[str, torch.Tensor], *text: list[float]) -> UlgmHook:
    """A hook whose text labels were these at each epoch's end; those of audio stayed."""
    made = UlgmHook(UlgmConfig(), TrainingData(labels, info()), {"fusion": 2, "text": 2, "audio": 2})
    made.history = [{"fusion": HUMAN, "text": torch.tensor(values), "audio": HUMAN} for values in text]
    return made


def movement(made: UlgmHook) -> pd.DataFrame:
    return pd.DataFrame(made.artifacts()["label_movement"])


# --- the hook's tables


def test_movement_by_hand():
    table = movement(hook({"M": HUMAN}, HUMAN.tolist(), [2, 0.5, 0, 2], [2, -1, -0.5, 1]))
    assert table["epoch"].tolist() == [1, 1, 2, 2, 3, 3]
    assert table["modality"].tolist() == ["text", "audio"] * 3
    text = table[table["modality"] == "text"]
    assert text["moved"].tolist() == [0, (1 + 1.5 + 0 + 0) / 4, (0 + 1.5 + 0.5 + 1) / 4]
    assert text["distance"].tolist() == [0, (1 + 1.5) / 4, (1 + 0 + 0.5 + 1) / 4]
    assert text["changed sign"].tolist() == [0, 1 / 4, 1 / 4]  # −1 to 0.5; 0 to −0.5
    covariance, variances = 0.4375 + 0.9375 + 0.5625 + 1.3125, 5 * 3.1875
    assert text["Corr multimodal"].tolist()[:2] == pytest.approx([1, covariance / variances**0.5])
    audio = table[table["modality"] == "audio"].drop(columns=["epoch", "modality"])
    assert audio.to_numpy().tolist() == [pytest.approx([0, 0, 0, 1])] * 3


def test_in_epoch_one_labels_have_moved_from_the_multimodal_label():
    assert movement(hook({"M": HUMAN}, [2.0, -1.0, 0.0, 2.0]))["moved"].tolist() == [0.25, 0]


def test_correlation_with_true_labels_beside_that_of_the_multimodal_one():
    table = movement(hook({"M": HUMAN, "T": TRUE}, HUMAN.tolist(), [2, 0.5, 0, 2]))
    plain, generated = -2 / 20**0.5, 0.5 / (4 * 3.1875) ** 0.5
    assert table["Corr true"].tolist() == pytest.approx([plain, math.nan, generated, math.nan], nan_ok=True)
    assert table["Corr true, multimodal"].tolist() == pytest.approx([plain, math.nan] * 2, nan_ok=True)
    assert list(table).index("Corr true") == 6


def test_without_true_labels_no_column_speaks_of_them():
    made = hook({"M": HUMAN}, HUMAN.tolist())
    assert made.artifacts().keys() == {"labels", "label_movement"}
    assert not [column for column in movement(made) if "true" in column]


def test_true_labels_are_saved_by_clip():
    tables = hook({"M": HUMAN, "T": TRUE}, HUMAN.tolist()).artifacts()
    assert tables["true_labels"]["index"] == [0, 1, 2, 3]
    assert tables["true_labels"]["text"].tolist() == TRUE.tolist()
    assert tables["true_labels"].keys() == {"index", "text"}


@pytest.mark.parametrize("supervision", ["human", "multimodal"])
def test_labels_that_nothing_generated_have_no_movement(supervision):
    config = UlgmConfig(supervision=supervision)
    made = UlgmHook(config, TrainingData({"M": HUMAN, "T": TRUE}, info()), {"fusion": 2, "text": 2})
    made.end_epoch(1)
    assert made.artifacts().keys() == {"labels"}


# --- the control: the same heads, and labels that nothing moves


def test_the_loss_of_heads_is_the_mean_error_of_every_modality():
    made = heads_hook(HeadsConfig(tasks="MT"), TrainingData({"M": HUMAN}, info()), {"fusion": 2, "text": 3, "audio": 2})
    features = {"fusion": torch.randn(4, 2), "text": torch.randn(4, 3), "audio": torch.randn(4, 2)}
    output, batch = FusionOutput(torch.zeros(4), features), Batch(index=torch.arange(4))
    made.eval()
    expected = (made.supervision.predict(features)["text"] - HUMAN).abs().mean()
    assert made.loss(output, batch).item() == pytest.approx(expected.item())
    for epoch in (1, 2, 3):
        made.train()
        made.loss(output, batch)
        made.observe(output, batch, epoch)
        made.end_epoch(epoch)
    made.eval()
    assert made.loss(output, batch).item() == pytest.approx(expected.item())
    assert all(torch.equal(epoch["text"], HUMAN) for epoch in made.history)


def test_keys_of_heads_are_those_of_ulgm():
    assert HeadsConfig.model_fields.keys() == {"tasks", "head_dims", "head_dropouts"}
    for key, info_of_key in HeadsConfig.model_fields.items():
        twin = UlgmConfig.model_fields[key]
        assert (info_of_key.default, info_of_key.description) == (twin.default, twin.description)
        assert info_of_key.annotation == twin.annotation


# --- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder) -> registry.Result:
    """Two seeds of three epochs, on a file with true labels."""
    folder = tmp_path_factory.mktemp("trained")
    return registry.run(
        "self_mm",
        "custom",
        data=human_labels(folder),
        text_encoder=encoder,
        label_range=3.0,
        seeds=[7, 8],
        runs=folder / "runs",
        config={"epochs": 3, "batch_size": 4, "update_epochs": 1},
        device="cpu",
    )


def changed(result: registry.Result, folder: Path, **tables: pd.DataFrame) -> registry.Run:
    """A copy of a run with other tables."""
    shutil.copytree(result.runs[0].folder, folder / "7")
    for name, table in tables.items():
        table.to_csv(folder / "7" / f"{name}.csv", index=False)
    summary = json.loads((folder / "7" / "metrics.json").read_text())
    (folder / "7" / "metrics.json").write_text(json.dumps({**summary, "lines": {}}))
    return load_run(folder / "7")


def long(result: registry.Result, folder: Path, epochs: int, best: int) -> registry.Run:
    """A copy of a run that was trained for so many epochs."""
    run = load_run(result.runs[0].folder)
    copies = {}
    for name in ("labels", "label_movement"):
        last = run.table(name).query("epoch == 3")
        copies[name] = pd.concat([last.assign(epoch=epoch) for epoch in range(1, epochs + 1)])
    made = changed(result, folder, **copies)
    summary = {**made.summary, "best_epoch": best}
    (made.folder / "metrics.json").write_text(json.dumps(summary))
    return load_run(made.folder)


def test_the_saved_movement_is_that_of_the_saved_labels(trained):
    run = load_run(trained.runs[0].folder)
    labels, table = run.table("labels"), run.table("label_movement")
    by_epoch = {epoch: rows.reset_index() for epoch, rows in labels.groupby("epoch")}
    for row in table.to_dict("records"):
        now, name = by_epoch[row["epoch"]], row["modality"]
        before = by_epoch.get(row["epoch"] - 1, now.assign(**{name: now["fusion"]}))
        assert row["moved"] == pytest.approx(np.abs(now[name] - before[name]).mean(), abs=1e-6)
        assert row["distance"] == pytest.approx(np.abs(now[name] - now["fusion"]).mean(), abs=1e-6)
        assert row["Corr multimodal"] == pytest.approx(np.corrcoef(now[name], now["fusion"])[0, 1], abs=1e-5)
    assert (table["moved"] > 0).tolist() == [False] * 3 + [True] * 6


def test_a_run_or_the_seeds_of_a_configuration(trained):
    folders = [run.folder for run in trained.runs]
    assert [run.folder for run in find_runs(folders[1])] == [folders[1]]
    assert [run.folder for run in find_runs(trained.folder)] == folders


def test_seeds_are_in_their_order(trained, tmp_path):
    for seed in ("1111", "7", "8"):
        shutil.copytree(trained.runs[0].folder, tmp_path / seed)
    (tmp_path / "9.failed.log").write_text("a seed that failed")
    assert [run.folder.name for run in find_runs(tmp_path)] == ["7", "8", "1111"]


@pytest.mark.parametrize(
    ("epochs", "best", "shown"),
    [
        (1, 1, [1]),
        (3, 1, [1, 2, 3]),
        (5, 4, [1, 2, 3, 4, 5]),
        (6, 4, [1, 2, 3, 4, 6]),
        (15, 7, [1, 2, 7, 11, 15]),
        (20, 20, [1, 2, 6, 11, 20]),
        (9, 1, [1, 2, 5, 7, 9]),
    ],
)
def test_at_most_five_epochs_are_shown(trained, tmp_path, epochs, best, shown):
    labels = read_labels(long(trained, tmp_path, epochs, best))
    assert labels.shown_epochs == shown
    rows = labels.movement_rows()
    assert len(rows) == 3 * len(shown)
    assert [row["epoch"] for row in rows[::3]] == [
        f"{epoch} (best)" if epoch == best else str(epoch) for epoch in shown
    ]


def test_a_figure_that_is_not_there_is_a_dash(trained, tmp_path):
    table = load_run(trained.runs[0].folder).table("label_movement").assign(**{"Corr true": math.nan})
    rows = read_labels(changed(trained, tmp_path, label_movement=table)).movement_rows()
    assert {row["Corr true"] for row in rows} == {"-"}


def test_labels_by_clip(trained):
    run = load_run(trained.runs[0].folder)
    table = read_labels(run).by_clip(2)
    modalities = ["text", "audio", "vision"]
    assert list(table) == ["id", "multimodal", *modalities, *(f"true {name}" for name in modalities)]
    labels, true = run.table("labels").query("epoch == 2"), run.table("true_labels")
    assert table["id"].tolist() == labels["id"].tolist() == true["id"].tolist()
    assert table["multimodal"].tolist() == labels["fusion"].tolist()
    assert table["audio"].tolist() == labels["audio"].tolist()
    assert table["true audio"].tolist() == true["audio"].tolist()


def test_labels_by_clip_without_true_ones(trained, tmp_path):
    run = changed(trained, tmp_path)
    run.summary["artifacts"].remove("true_labels")
    assert list(read_labels(run).by_clip(1)) == ["id", "multimodal", "text", "audio", "vision"]


# --- the figure


def test_the_figure_has_a_row_a_modality_and_a_column_an_epoch(trained):
    labels = read_labels(load_run(trained.runs[0].folder))
    made = draw(labels)
    titles = [axes.get_title() for axes in made.axes]
    best = labels.best_epoch
    assert titles == [f"epoch {n}{' (best)' if n == best else ''}" for n in (1, 2, 3)] + [""] * 6
    assert [text.get_text() for axes in made.axes for text in axes.texts] == ["text", "audio", "vision"]


def test_the_bars_are_shares_of_the_clips_in_each_bin(trained):
    labels = read_labels(load_run(trained.runs[0].folder))
    axes = draw(labels).axes[4]  # audio, epoch 2
    counts, _ = np.histogram(labels.of_epoch(2)["audio"], bins=31, range=(-3.1, 3.1))
    corners = axes.patches[0].get_xy()[1 : 2 * len(counts) : 2]  # the upper left one of each bar
    assert axes.get_xlim() == pytest.approx((-3.1, 3.1))
    assert sum(counts) == 8
    assert corners.tolist() == [pytest.approx(bar) for bar in zip(np.linspace(-3.1, 2.9, 31), counts / 8, strict=True)]


def test_labels_beyond_the_datas_range_are_in_the_figure(trained, tmp_path):
    wide = load_run(trained.runs[0].folder).table("labels")
    wide["text"] = wide["text"].clip(-1, 1) * 5
    labels = read_labels(changed(trained, tmp_path, labels=wide))
    assert labels.range == 5
    assert draw(labels).axes[0].get_xlim()[1] > 5


def test_drawing_leaves_matplotlib_as_it_was(trained, empty_folder):
    import matplotlib

    before = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    write_files([read_labels(load_run(trained.runs[0].folder))])
    assert (dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules) == before


# --- the command


def test_it_prints_the_table_and_writes_two_files(benchmark, trained, empty_folder):
    run = load_run(trained.runs[0].folder)
    code, out, err = benchmark("labels", run.folder)
    assert (code, err) == (0, "")
    assert "self_mm on custom, seed 7, generated labels of the train split" in out
    assert f"{run.best_epoch} (best)" in out
    for column in run.table("label_movement"):
        assert column in out
    assert "changed sign: share of clips whose label has another sign (−1, 0, +1) than the multimodal one" in out
    assert "all 3 epochs" not in out
    assert "figure: labels-self_mm-custom-7.png\nlabels by clip: labels-self_mm-custom-7.csv\n" in out
    assert Path("labels-self_mm-custom-7.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv("labels-self_mm-custom-7.csv")
    best = run.table("labels").query(f"epoch == {run.best_epoch}")
    assert table["text"].tolist() == best["text"].tolist()
    assert len(list(empty_folder.iterdir())) == 2


def test_each_seed_has_its_own(benchmark, trained, empty_folder):
    code, out, _ = benchmark("labels", trained.folder, "--figure", "new/fig.svg", "--epoch", 2)
    assert code == 0
    assert out.count("generated labels of the train split") == 2
    made = {str(path.relative_to(empty_folder)) for path in empty_folder.rglob("*.*")}
    assert made == {f"new/fig-{n}.svg" for n in (7, 8)} | {f"labels-self_mm-custom-{n}.csv" for n in (7, 8)}
    for seed, run in zip((7, 8), trained.runs, strict=True):
        second = load_run(run.folder).table("labels").query("epoch == 2")
        assert pd.read_csv(f"labels-self_mm-custom-{seed}.csv")["vision"].tolist() == second["vision"].tolist()


def test_a_long_training_says_where_every_epoch_is(benchmark, trained, tmp_path, empty_folder):
    run = long(trained, tmp_path, 30, 20)
    out = benchmark("labels", run.folder)[1]
    assert f"all 30 epochs: {run.folder / 'label_movement.csv'}" in out
    assert "20 (best)" in out


@pytest.mark.parametrize(("best", "vain"), [(1, True), (2, True), (3, False)])
def test_a_best_epoch_before_any_label_had_moved_is_said(benchmark, trained, tmp_path, empty_folder, best, vain):
    run = changed(trained, tmp_path)
    (run.folder / "metrics.json").write_text(json.dumps({**run.summary, "best_epoch": best}))
    out = benchmark("labels", run.folder)[1]
    assert ("no label had moved before the best epoch, whose weights have seen human labels only" in out) == vain


def test_json_and_nothing_else(benchmark, trained, tmp_path, empty_folder):
    table = load_run(trained.runs[0].folder).table("label_movement")
    table.loc[0, "Corr true"] = math.nan
    folder = changed(trained, tmp_path, label_movement=table).folder
    code, out, err = benchmark("labels", folder, "--json", "--csv", "mine.csv")
    shown = json.loads(out)
    assert (code, err) == (0, "")
    assert (shown["model"], shown["dataset"]) == ("self_mm", "custom")
    (run,) = shown["runs"]
    assert run.keys() == {"seed", "best_epoch", "label_movement", "folder", "figure", "csv"}
    assert (run["seed"], run["csv"], run["folder"]) == (7, "mine.csv", str(folder))
    assert [(row["epoch"], row["modality"]) for row in run["label_movement"]][:4:3] == [(1, "text"), (2, "text")]
    assert run["label_movement"][0]["Corr true"] is None
    assert Path("mine.csv").exists()


def test_a_figure_of_the_same_name_is_replaced(benchmark, trained, empty_folder):
    Path("f.pdf").write_text("an older figure")
    assert benchmark("labels", trained.runs[0].folder, "--figure", "f.pdf")[0] == 0
    assert Path("f.pdf").read_bytes().startswith(b"%PDF")
    assert b"/Type3" not in Path("f.pdf").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--figure", "f.jpg"], "--figure f.jpg must end in .png, .pdf, .svg"),
        (["--figure", "f"], "--figure f must end in .png, .pdf, .svg"),
        (["--epoch", 4], "has labels of epochs 1 to 3, and none of 4"),
        (["--epoch", 0], "has labels of epochs 1 to 3, and none of 0"),
    ],
)
def test_options_that_are_wrong(benchmark, trained, empty_folder, options, message):
    code, out, err = benchmark("labels", trained.runs[0].folder, *options)
    assert (code, out, err.count("error: ")) == (2, "", 1)
    assert message in err
    assert not list(empty_folder.glob("*.csv"))
    assert not list(empty_folder.glob(".*"))


@pytest.mark.parametrize("option", ["--figure", "--csv"])
def test_a_place_that_cannot_be_written(benchmark, trained, empty_folder, option):
    Path("file").write_text("no folder")
    code, out, err = benchmark("labels", trained.runs[0].folder, option, "file/labels.png")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "error: file/labels.png cannot be written: " in err


@pytest.mark.parametrize("option", ["--figure", "--csv"])
def test_nothing_is_written_into_a_run(benchmark, trained, tmp_path, empty_folder, option):
    folder = changed(trained, tmp_path).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = benchmark("labels", folder, option, folder / "labels.csv")
    assert code == 2
    assert "labels.csv would lie in the folder of a run, which stays as it is: name another place" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_folders_that_are_no_run(benchmark, trained, tmp_path, empty_folder):
    broken = changed(trained, tmp_path).folder
    (broken / "history.csv").unlink()
    for folder, named in ((tmp_path / "nowhere", "nowhere"), (empty_folder, "work"), (broken, "7"), (tmp_path, "7")):
        code, out, err = benchmark("labels", folder)
        assert (code, out) == (2, "")
        assert f"{named} is not the folder of a finished run" in err
    assert list(empty_folder.iterdir()) == []


def test_a_run_without_generated_labels(benchmark, trained, tmp_path, encoder, empty_folder):
    result = registry.run(
        "mean+heads",
        "custom",
        data=feature_file(tmp_path),
        label_range=3.0,
        runs=tmp_path / "runs",
        config={"epochs": 1},
        plugins=[with_features(tmp_path)],
        device="cpu",
    )
    code, out, err = benchmark("labels", result.folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has no generated labels (no table 'label_movement')" in err
    assert "mean+heads (hooks: heads)" in err


def test_a_table_of_another_shape(trained, tmp_path):
    run = changed(trained, tmp_path, label_movement=pd.DataFrame({"a": [1]}))
    with pytest.raises(InputError, match=r"the table 'label_movement' of .*7 has no column epoch, modality"):
        read_labels(run)
