"""Event files for TensorBoard: what they hold, read back with its own reader, and that they change no result."""

from __future__ import annotations

import sys

import pytest

import registry
from registry.errors import InputError
from registry.tracking import FOLDER
from registry.training import Watcher
from tests.helpers import feature_file


@pytest.fixture
def options(tmp_path, encoder):
    """The arguments of a quick run."""
    settings = {"batch_size": 4, "epochs": 2}
    return {"data": feature_file(tmp_path), "text_encoder": encoder, "label_range": 3, "config": settings}


def events(folder):
    """Return TensorBoard's own view of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder))
    seen.Reload()
    return seen


def run(options, **more):
    return registry.run("self_mm", "custom", **options, **more)


def test_the_events_are_the_run_s_epochs_and_metrics(options, empty_folder):
    result = run(options, track="tensorboard")
    folder = empty_folder / "runs" / FOLDER / result.folder.relative_to("runs") / "1111"
    seen, history = events(folder), registry.load_run(result.runs[0].folder).history
    for tag, column in (("train/loss", "train_loss"), ("valid/MAE", "valid_mae")):
        assert [event.step for event in seen.Scalars(tag)] == [1, 2]
        assert [event.value for event in seen.Scalars(tag)] == pytest.approx(list(history[column]))
    assert seen.Scalars("epoch/seconds")[0].value > 0
    assert seen.Scalars("test/MAE")[0].value == pytest.approx(result.mean["MAE"])


def test_the_settings_stand_beside_the_metrics(options, empty_folder):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    result = run(options, track="tensorboard")
    seen = events(empty_folder / "runs" / FOLDER / result.folder.relative_to("runs") / "1111")
    content = seen.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["batch_size"].number_value == 4
    assert settings["seed"].number_value == 1111
    assert settings["modalities"].string_value == "text,audio,vision"


def test_no_result_depends_on_it(options, tmp_path):
    plain = run(options, runs=tmp_path / "plain")
    tracked = run(options, runs=tmp_path / "tracked", track="tensorboard")
    assert plain.mean == tracked.mean
    assert plain.folder.name == tracked.folder.name


def test_each_epoch_is_there_while_the_next_is_trained(options, empty_folder):
    seen = []

    class Looks(Watcher):
        def step(self, epoch, step, steps):
            files = list((empty_folder / "runs" / FOLDER).rglob("events*"))
            seen.append((epoch, len(events(files[0].parent).Scalars("valid/MAE")) if files else 0))

    run(options, track="tensorboard", watcher=Looks())
    assert {1: 0, 2: 1}.items() <= dict(seen).items()


def test_a_run_from_before_is_written_from_its_history_and_one_again_replaces_it(options, empty_folder):
    folder = empty_folder / "runs" / FOLDER / run(options).folder.relative_to("runs") / "1111"
    assert not folder.exists()
    run(options, track="tensorboard")
    assert len(events(folder).Scalars("valid/MAE")) == 2
    run(options, track="tensorboard", force=True)
    assert len(events(folder).Scalars("valid/MAE")) == 2


def test_a_fault_of_tracking_is_no_fault_of_training(options, empty_folder):
    (empty_folder / "runs").mkdir()
    (empty_folder / "runs" / FOLDER).write_text("in the way")
    with pytest.warns(UserWarning, match="tracking has stopped, training goes on"):
        result = run(options, track="tensorboard")
    assert [done.status for done in result.runs] == ["ok"]


def test_a_tracker_that_is_not_there(options, monkeypatch, empty_folder):
    with pytest.raises(InputError, match="unknown tracker 'tensorbord', did you mean 'tensorboard'"):
        run(options, track="tensorbord")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r'pip install "selfmm-plugin\[tensorboard\]"'):
        run(options, track="tensorboard")
    assert list(empty_folder.iterdir()) == []


def test_the_command_says_how_to_look_on(benchmark, options, empty_folder):
    given = ["--models", "text_only", "-d", "custom", "--label-range", 3, "--data", options["data"], "--seeds", 1]
    given += ["--text-encoder", options["text_encoder"], "--epochs", 1]
    code, _, err = benchmark("compare", *given, "--track", "tensorboard")
    assert code == 0
    assert "tensorboard --logdir runs/.tensorboard" in err
    assert len(list((empty_folder / "runs" / FOLDER).rglob("events*"))) >= 1
    assert benchmark("table", "runs")[0] == 0
