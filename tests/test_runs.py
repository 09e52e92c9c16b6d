"""Run folders: written whole or not at all, found again, and loaded with the same predictions."""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import registry
from registry import BenchmarkError, InputError, Training, load_run
from registry.data.batches import predict
from registry.jobs import make_plan
from registry.runs import finished, identity, require_writable, writing
from registry.training import Watcher
from tests.helpers import feature_file, tiny_encoder

FILES = {
    "config.json",
    "environment.json",
    "history.csv",
    "label_movement.csv",
    "labels.csv",
    "log.txt",
    "metrics.json",
    "model.safetensors",
    "predictions.csv",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder):
    """A finished run and the file it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    data = feature_file(folder)
    result = registry.run(
        "self_mm",
        "custom",
        data=data,
        text_encoder=encoder,
        label_range=3.0,
        runs=folder / "runs",
        config={"epochs": 2, "batch_size": 4, "update_epochs": 1},
        device="cpu",
    )
    return load_run(result.runs[0].folder), data


# --- the folder


def test_it_holds_everything_and_nothing_else(trained):
    run, _ = trained
    assert {path.name for path in run.folder.iterdir()} == FILES
    assert [path.name for path in run.folder.parent.iterdir()] == ["1111"]
    assert run.folder.parts[-4:-2] == ("self_mm", "custom")


def test_config_and_environment(trained):
    run, data = trained
    settings = run.settings
    assert (settings["model"], settings["dataset"], settings["seed"]) == ("self_mm", "custom", 1111)
    assert settings["config"]["batch_size"] == 4
    assert settings["config"]["hook.distance"] == "l2"
    assert settings["data"]["dims"] == {"text": 8, "audio": 5, "vision": 3}
    assert settings["data"]["sizes"] == {"train": 8, "valid": 4, "test": 4}
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == metadata.version("torch")
    assert environment["data_sha256"] == settings["data"]["sha256"]
    assert environment["sources"].keys() == {"model self_mm", "hook ulgm"}
    assert str(data.parent) not in (run.folder / "config.json").read_text()


def test_tables_speak_of_clips_by_id(trained):
    run, _ = trained
    assert run.predictions["id"].tolist() == [f"test$_${clip}" for clip in range(4)]
    assert list(run.predictions) == ["id", "label", "prediction"]
    labels = run.table("labels")
    assert list(labels) == ["epoch", "id", "fusion", "text", "audio", "vision"]
    assert labels["id"].tolist() == [f"train$_${clip}" for clip in range(8)] * 2
    assert labels["epoch"].tolist() == [1] * 8 + [2] * 8
    first = labels[labels["epoch"] == 1]
    np.testing.assert_array_equal(first["text"], first["fusion"])
    note, *epochs = (run.folder / "log.txt").read_text().splitlines()
    assert note.startswith("raw_text was tokenised for")
    assert len(run.history) == len(epochs) == 2


def test_metrics_are_those_of_the_predictions(trained):
    run, _ = trained
    error = (run.predictions["prediction"] - run.predictions["label"]).abs().mean()
    assert run.metrics["MAE"] == pytest.approx(error, abs=1e-6)
    best = run.history.loc[run.history["valid_mae"].idxmin()]
    assert (run.best_epoch, run.summary["valid_mae"]) == (best["epoch"], pytest.approx(best["valid_mae"]))


@pytest.mark.parametrize("what", ["dtype", "device"])
def test_the_loaded_model_is_the_same_whatever_the_caller_set(trained, what):
    setter = getattr(torch, f"set_default_{what}")
    setter({"dtype": torch.float64, "device": "meta"}[what])
    try:
        with torch.inference_mode():
            parameters = list(load_run(trained[0].folder).model.parameters())
    finally:
        setter({"dtype": torch.float32, "device": None}[what])
    kinds = {(p.dtype, p.device.type, p.is_inference()) for p in parameters}
    assert kinds == {(torch.float32, "cpu", False)}


def test_the_loaded_model_predicts_what_was_written(trained, encoder):
    run, data = trained
    plan = make_plan("self_mm", "custom", label_range=3.0)
    split = plan.read(data, encoder, Watcher()).split("test", torch.device("cpu"))
    predictions = predict(run.model, split).numpy()
    np.testing.assert_allclose(predictions, run.predictions["prediction"], atol=1e-6)
    assert not run.model.training


def test_the_weights_hold_the_hook_as_well(trained):
    run, _ = trained
    names = load_file(run.folder / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"model", "hook"}
    assert "hook.ulgm.supervision.generator.clips" in names


def test_an_id_that_looks_like_a_number_or_like_nothing_stays_text(tmp_path):
    finish(tmp_path)
    pd.DataFrame({"id": ["007", "NA", "nan"], "label": 0.5, "prediction": [1.0, 2.0, np.nan]}).to_csv(
        tmp_path / "predictions.csv", index=False
    )
    table = load_run(tmp_path).predictions
    assert table["id"].tolist() == ["007", "NA", "nan"]
    assert np.isnan(table["prediction"][2])


# --- what cannot be loaded


@pytest.mark.parametrize(
    ("make", "fault"),
    [(lambda folder: None, "there is no such folder"), (lambda folder: folder.mkdir(), r"metrics\.json is missing")],
)
def test_not_a_run(tmp_path, make, fault):
    make(tmp_path / "run")
    with pytest.raises(InputError, match=f"is not the folder of a finished run: {fault}"):
        load_run(tmp_path / "run")


def finish(folder: Path) -> None:
    """Make a folder that looks like a finished run."""
    (folder / "metrics.json").write_text('{"metrics": {}, "best_epoch": null, "artifacts": []}')
    settings = {"model": "mean", "dataset": "custom", "seed": 1, "config": {}, "hooks": {}, "text_encoder": None}
    settings["data"] = {"metrics": "mosi", "sha256": None, "label_range": 3.0}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text("{}")
    save_file({"x": torch.zeros(100)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("metrics.json", content) for content in ("{", "{}", "null", "", '{"metrics": null}')),
        *(("config.json", content) for content in ("{", "{}", "[]", "")),
        *(("environment.json", content) for content in ("{", "[]", "")),
        ("metrics.json", '{"metrics": {}}'),
        ("metrics.json", '{"metrics": {"MAE": "x"}, "best_epoch": null, "artifacts": []}'),
        ("metrics.json", "[" * 100_000),
        ("metrics.json", '{"metrics": {}, "best_epoch": null, "artifacts": ["absent"]}'),
        ("metrics.json", '{"metrics": {"MAE": 1.0}, "best_epoch": null, "artifacts": []}'),  # without predictions
        ("metrics.json", '{"metrics": {}, "best_epoch": 3, "artifacts": []}'),  # without history
        ("model.safetensors", ""),
        ("model.safetensors", "x" * 50),
        ("model.safetensors", None),
    ],
)
def test_a_run_with_a_broken_file_is_not_finished(tmp_path, name, content):
    finish(tmp_path)
    assert finished(tmp_path)
    if content is None:
        os.truncate(tmp_path / name, 300)
    else:
        (tmp_path / name).write_text(content)
    assert not finished(tmp_path)
    file = {'"absent"': "absent.csv", "1.0": "predictions.csv", "3,": "history.csv"}
    broken = next((other for sign, other in file.items() if content and sign in content), name)
    with pytest.raises(InputError, match=f"is not the folder of a finished run: {broken} "):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "environment.json", "model.safetensors"])
def test_a_run_that_lacks_a_file_is_not_finished(tmp_path, name):
    finish(tmp_path)
    (tmp_path / name).unlink()
    assert not finished(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": {"metrics": "mosi", "sha256": None, "label_range": 3.0}}, "KeyError"),
        ({"text_encoder": {"config": {"model_type": "nonsense"}, "name": "", "sha256": ""}}, "ValueError"),
        ({"config": {"post_fusion_dim": 7}}, "RuntimeError: .*size mismatch"),
    ],
)
def test_a_model_that_cannot_be_made_again_says_why(trained, tmp_path, change, reason):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(InputError, match=f"the model of .*run cannot be made again: {reason}"):
        _ = load_run(folder).model


def test_a_table_that_is_not_there(tmp_path):
    finish(tmp_path)
    with pytest.raises(InputError, match="has no table 'labels'"):
        load_run(tmp_path).table("labels")


# --- writing


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    with writing(tmp_path / "run") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["run"]


def interrupted(folder: Path, error: type[BaseException]) -> None:
    with writing(folder) as temporary:
        (temporary / "a").write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    with writing(tmp_path / "run") as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(error):
        interrupted(tmp_path / "run", error)
    assert (tmp_path / "run" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_a_new_run_replaces_an_old_one_as_a_whole(tmp_path):
    for name in ("old", "new"):
        with writing(tmp_path / "run") as temporary:
            (temporary / name).touch()
    assert os.listdir(tmp_path / "run") == ["new"]
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_is_no_folder_is_replaced_too(tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    if kind == "link":
        elsewhere.mkdir()
        (elsewhere / "kept").touch()
    (tmp_path / "run").touch() if kind == "file" else (tmp_path / "run").symlink_to(elsewhere)
    with writing(tmp_path / "run") as temporary:
        (temporary / "new").touch()
    assert os.listdir(tmp_path / "run") == ["new"]
    assert set(os.listdir(tmp_path)) == {"run"} | ({"elsewhere"} if kind == "link" else set())
    assert kind != "link" or os.listdir(elsewhere) == ["kept"]


def test_what_a_crash_left_behind_does_not_stand_in_the_way(tmp_path):
    for name in (".run.old", ".run.ab12cd34", ".run.ab12cd34.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    for name in ("old", "new"):
        with writing(tmp_path / "run") as temporary:
            (temporary / name).touch()
    assert os.listdir(tmp_path / "run") == ["new"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: .*file is a file"):
        require_writable(tmp_path / "file" / "run")
    with pytest.raises(BenchmarkError, match="cannot be written"), writing(tmp_path / "file" / "run"):
        pass
    require_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path) == ["file"]


# --- identity


def test_the_hash_depends_on_what_changes_a_result_and_on_nothing_else(tmp_path, encoder):
    def hash_of(data: Path, text_encoder: Path | str = encoder, **options) -> str:
        arguments = {"model": "self_mm", "dataset": "custom", "label_range": 3.0, **options}
        plan = make_plan(**arguments)
        return plan.read(data, str(text_encoder), Watcher()).identity()

    data = feature_file(tmp_path)
    moved = feature_file(tmp_path, name="moved.pkl")
    other = feature_file(tmp_path, name="other.pkl", audio=lambda a: a + 1)
    first = hash_of(data)
    assert hash_of(moved) == hash_of(data, config={"batch_size": 16}) == first
    copy = tmp_path / "copied encoder"
    shutil.copytree(encoder, copy)
    assert hash_of(data, text_encoder=copy) == first
    torch.manual_seed(1)
    tiny_encoder(copy)  # other random weights
    assert hash_of(data, text_encoder=copy) != first
    changed = [
        hash_of(other),
        hash_of(data, config={"batch_size": 5}),
        hash_of(data, config={"hook.distance": "cosine"}),
        hash_of(data, label_range=4.0),
    ]
    assert len({first, *changed}) == 1 + len(changed)


def test_the_metrics_and_the_hooks_version_are_in_the_hash(tmp_path, encoder):
    def hash_of(metrics: str, version: str) -> str:
        facts = tmp_path / "facts.py"
        facts.write_text(
            "from registry import DatasetSpec, HookSpec, TrainingHook\n"
            f"SIX = DatasetSpec(name='six', summary='', label_range=3.0, metrics={metrics!r})\n"
        )
        hook = tmp_path / "noop.py"
        hook.write_text(
            "from registry import HookSpec, TrainingHook\n"
            f"NOOP = HookSpec(name='noop', summary='', build=print, version={version!r})\n"
        )
        plan = make_plan("self_mm+noop", "six", plugins=[str(facts), str(hook)])
        return plan.read(feature_file(tmp_path), str(encoder), Watcher()).identity()

    assert len({hash_of("mosi", "1"), hash_of("sims", "1"), hash_of("mosi", "2")}) == 3


def test_the_hash_is_stable():
    assert identity({"b": 1, "a": Training().model_dump()}) == identity({"a": Training().model_dump(), "b": 1})
    assert len(identity({})) == 12


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer"])
def test_another_text_encoder_is_another_run(tmp_path, encoder, change):
    """The same weights read otherwise, or fed otherwise, are not the same encoder."""
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    if change == "weights":
        torch.manual_seed(1)
        tiny_encoder(other)
    elif change == "config":
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.9}))
    else:
        text = (other / "tokenizer.json").read_text()
        swapped = text.replace('"good"', '"?"').replace('"bad"', '"good"').replace('"?"', '"bad"')
        (other / "tokenizer.json").write_text(swapped)
    plan, data = make_plan("self_mm", "custom", label_range=3.0), feature_file(tmp_path)
    first, second = (plan.read(data, str(folder), Watcher()).identity() for folder in (encoder, other))
    assert first != second


def test_the_old_run_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    with writing(tmp_path / "run") as temporary:
        (temporary / "old").touch()
    replace, calls = os.replace, []

    def fail_at_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", fail_at_second)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "run") as temporary:
        (temporary / "new").touch()
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["old"]


def test_a_full_disk_is_said_in_one_sentence(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(BenchmarkError, match="cannot be written: I/O error: no space"), writing(tmp_path / "run"):
        raise SafetensorError("I/O error: no space")
    assert os.listdir(tmp_path) == []


def test_everybody_who_may_read_the_folder_may_read_the_weights(trained):
    run, _ = trained
    assert (run.folder / "model.safetensors").stat().st_mode == (run.folder / "config.json").stat().st_mode


def test_a_model_that_is_not_packaged_says_how_to_load_it(tmp_path):
    finish(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model": "mine"}))
    with pytest.raises(InputError, match=r"unknown model 'mine'.*loaded with plugins=\[…\]"):
        _ = load_run(tmp_path).model


@pytest.mark.parametrize("name", ["predictions", "history", "labels"])
def test_a_table_that_was_cut_is_told_by_its_lines(trained, tmp_path, name):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    table = folder / f"{name}.csv"
    lines = table.read_text().splitlines()
    table.write_bytes("\r\n".join([*lines, ""]).encode())  # as an editor may save it
    assert finished(folder)
    table.write_text("\n".join(lines)[:-1])
    with pytest.raises(
        InputError, match=rf"{name}\.csv is broken: it has {len(lines) - 1} lines, and was written with"
    ):
        load_run(folder)


def test_a_model_with_another_kind_of_encoder_loads_too(tmp_path):
    """DistilBERT's config calls the width `dim`."""
    result = registry.run(
        "self_mm",
        "custom",
        data=feature_file(tmp_path),
        text_encoder=str(tiny_encoder(tmp_path / "distil", kind="distil")),
        label_range=3.0,
        runs=tmp_path / "runs",
        config={"epochs": 1},
    )
    run = load_run(result.runs[0].folder)
    assert run.model.encoders["text"].model.config.dim == 8
    assert run.settings["text_encoder"]["config"]["model_type"] == "distilbert"


def test_the_notes_on_the_data_are_kept(trained):
    environment = trained[0].environment
    assert environment["data_file"] == "features.pkl"
    assert datetime.fromisoformat(environment["started"]).tzinfo is not None


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n1,2,3\n", b"id\n\xff\xfe"])
def test_a_table_that_cannot_be_read(tmp_path, content):
    finish(tmp_path)
    (tmp_path / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"labels\.csv cannot be read"):
        load_run(tmp_path).table("labels")


def test_a_run_without_the_rows_of_a_table_is_not_finished(tmp_path):
    finish(tmp_path)
    (tmp_path / "metrics.json").write_text('{"metrics": {"MAE": 1.0}, "best_epoch": null, "artifacts": []}')
    (tmp_path / "predictions.csv").write_text("id\n")
    assert finished(tmp_path)
    (tmp_path / "predictions.csv").write_text("")
    assert not finished(tmp_path)
