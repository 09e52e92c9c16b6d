"""The search for hyper-parameters: what it tries, what it scores, and that it goes on where it was left."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

import registry
from registry.errors import BenchmarkError, InputError
from registry.training import Watcher
from registry.tuning_figure import draw
from tests.helpers import feature_file

MODEL = """
import os, time
import torch
from registry import FusionOutput, Rates, register_model

class Settings(Rates):
    offset: float = 0.0
    fault: str = "none"
    stop: bool = False

@register_model("shift", summary="predicts a constant", config=Settings, search={"offset": {"low": -2.0, "high": 2.0}})
class Shift(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.offset, self.feature_dims = torch.nn.Parameter(torch.tensor(config.offset)), {}
        while config.stop and not os.path.exists("go"):
            open("stopped", "w").close()
            time.sleep(0.02)
        if config.fault == "raises":
            raise RuntimeError("no such luck")
        if config.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.scale = float("nan") if config.fault == "nan" else 1.0

    def forward(self, batch):
        return FusionOutput(self.offset.expand(len(batch)) * self.scale)
"""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk():
    """SQLite waits until the disk has what it wrote, many times a trial."""

    def listen(connection, _):
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", listen)
    yield
    event.remove(Engine, "connect", listen)


@pytest.fixture
def options(tmp_path, empty_folder) -> dict:
    """The arguments of a quick search, of a model that predicts a constant, in the folder `runs`."""
    (tmp_path / "shift.py").write_text(MODEL)
    given = {"data": feature_file(tmp_path), "label_range": 3, "plugins": [str(tmp_path / "shift.py")]}
    return {**given, "config": {"epochs": 1, "learning_rate": 0.0}, "trials": 4}


def tune(options, **changes):
    return registry.tune("shift", "custom", **{**options, **changes})


# --- the score


def test_the_best_constant_for_validation_wins(options, tmp_path):
    tuning = tune(options, search={"offset": [-2.5, 0.0, 0.5, 2.5]}, sampler="grid")
    labels = np.load(options["data"], allow_pickle=True)["valid"]["regression_labels"]
    scores = {offset: float(np.abs(labels - offset).mean()) for offset in (-2.5, 0.0, 0.5, 2.5)}
    assert {trial.settings["offset"]: trial.valid_mae for trial in tuning.trials} == pytest.approx(scores)
    assert scores[tuning.best.settings["offset"]] == min(scores.values())


def test_the_test_split_is_never_touched(options, tmp_path, monkeypatch):
    from registry import benchmark, jobs

    def split(job, name, device, original=jobs.Job.split):
        assert name != "test"
        return original(job, name, device)

    monkeypatch.setattr(jobs.Job, "split", split)
    monkeypatch.setattr(benchmark, "evaluate", lambda *_: pytest.fail("the test split was evaluated"))
    assert len(tune(options).trials) == 4


def test_scores_do_not_depend_on_the_test_split(options, tmp_path):
    other = feature_file(tmp_path, name="other.pkl", test={"regression_labels": lambda labels: -labels})
    scores = [[t.valid_mae for t in tune(options, data=data).trials] for data in (options["data"], other)]
    assert scores[0] == scores[1]


def test_the_best_configuration_run_again_has_the_same_validation_mae(tmp_path, encoder, empty_folder):
    given = {"data": feature_file(tmp_path), "label_range": 3, "text_encoder": encoder}
    tuning = registry.tune("text_only", "custom", **given, trials=3, config={"epochs": 2})
    result = registry.run("text_only", "custom", **given, config_file=tuning.config_file)
    saved = registry.load_run(result.runs[0].folder)
    assert saved.summary["valid_mae"] == tuning.best.valid_mae
    assert {key: saved.settings["config"][key] for key in tuning.best.settings} == tuning.best.settings
    assert saved.settings["config"]["epochs"] == 2


def test_several_seeds_are_scored_by_their_mean(tmp_path, encoder, empty_folder):
    given = {"data": feature_file(tmp_path), "label_range": 3, "text_encoder": encoder, "config": {"epochs": 1}}
    scores = {
        seeds: registry.tune("text_only", "custom", **given, trials=2, seeds=seeds).trials[0].valid_mae
        for seeds in ((1,), (2,), (1, 2))
    }
    assert scores[1, 2] == pytest.approx((scores[1,] + scores[2,]) / 2)


def test_a_searched_key_may_change_what_the_model_needs(tmp_path, encoder, empty_folder):
    given = {"data": feature_file(tmp_path), "label_range": 3, "text_encoder": encoder, "config": {"epochs": 1}}
    space = {"finetune_text": [True, False]}
    tuning = registry.tune("text_only", "custom", **given, search=space, search_file="none", sampler="grid")
    assert [trial.status for trial in tuning.trials] == ["ok", "ok"]
    assert tuning.trials[0].valid_mae != tuning.trials[1].valid_mae


@pytest.mark.parametrize("space", [{"standardize": [False, True]}, {"without": [[], ["audio"]]}])
def test_a_searched_key_may_change_what_is_made_of_the_data(tmp_path, encoder, empty_folder, space):
    given = {"data": feature_file(tmp_path), "label_range": 3, "text_encoder": encoder}
    config = {"epochs": 2, "batch_size": 4}
    tuning = registry.tune("lf_dnn", "custom", **given, config=config, search=space, search_file="none", sampler="grid")
    for trial in tuning.trials:
        result = registry.run("lf_dnn", "custom", **given, config={**config, **trial.settings})
        assert registry.load_run(result.runs[0].folder).summary["valid_mae"] == trial.valid_mae
    assert tuning.trials[0].valid_mae != tuning.trials[1].valid_mae


# --- trials


def test_the_first_trial_has_the_presets_values_where_the_space_has_them(options):
    tuning = tune(options, search={"batch_size": [16, 32], "weight_decay": [0.5, 0.25]}, trials=1)
    assert tuning.trials[0].settings == {"offset": 0.0, "batch_size": 32} | {
        "weight_decay": tuning.trials[0].settings["weight_decay"]
    }


@pytest.mark.parametrize("fault", ["nan", "raises", "memory"])
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(options, fault):
    tuning = tune(options, search={"fault": ["none", fault]}, search_file="none", sampler="grid")
    by_fault = {trial.settings["fault"]: trial for trial in tuning.trials}
    assert by_fault["none"].status == "ok"
    assert by_fault[fault].status == "failed"
    assert by_fault[fault].valid_mae is None
    reason = {"nan": "train loss nan", "raises": "RuntimeError: no such luck", "memory": "CUDA out of memory"}[fault]
    assert reason in by_fault[fault].reason
    assert tuning.counts == {"ok": 1, "failed": 1}


def test_a_search_without_a_result_says_why(options):
    with pytest.raises(BenchmarkError, match="has a result: 4 failed, as by: RuntimeError: no such luck"):
        tune(options, config={**options["config"], "fault": "raises"})


def test_a_hopeless_trial_is_pruned_and_not_without_pruning(options):
    config = {"epochs": 8, "learning_rate": 0.01}
    points = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 2.9, -2.9]
    given = {"config": config, "search": {"offset": points}, "sampler": "grid", "trials": 8}
    pruned = [trial for trial in tune(options, **given).trials if trial.status == "pruned"]
    assert pruned
    assert all("in epoch" in trial.reason and trial.number > 5 for trial in pruned)
    assert tune(options, **given, prune=False, study="whole").counts == {"ok": 8}


def test_the_same_configuration_is_not_trained_twice(options):
    told = []

    class Counts(Watcher):
        def start(self, seed, number, config):
            told.append(number)

    space = {"search": {"offset": [0.0, 1.0]}, "sampler": "random", "trials": 6}
    tuning = tune(options, **space, watcher=Counts())
    assert len(tuning.trials) == 6
    assert len(told) == 2
    assert [trial.reason for trial in tuning.trials].count("the same as trial 1") >= 1


def test_a_grid_ends_when_every_point_was_tried(options):
    space = {"offset": [0.0, 1.0], "batch_size": [4, 8]}
    tuning = tune(options, search=space, sampler="grid", trials=50)
    assert len(tuning.trials) == len({json.dumps(trial.settings) for trial in tuning.trials}) == 4
    with pytest.raises(InputError, match="--sampler grid takes lists of values, and offset has a range"):
        tune(options, sampler="grid")
    keys = ("batch_size", "update_epochs", "early_stop", "scheduler_patience")
    space |= {key: list(range(1, 11)) for key in keys}
    with pytest.raises(InputError, match="the space has 20,000 points, and 10,000 are the most"):
        tune(options, sampler="grid", search=space)


# --- going on


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.slow)])
def test_a_search_in_two_parts_tries_the_same_as_in_one(options, tmp_path, sampler):
    given = {"sampler": sampler, "search": {"batch_size": [4, 8]}}
    whole = tune(options, **given, trials=14, runs=tmp_path / "whole")
    tune(options, **given, trials=6)
    parts = tune(options, **given, trials=14)
    assert [t.settings for t in whole.trials] == [t.settings for t in parts.trials]
    assert [t.valid_mae for t in whole.trials] == [t.valid_mae for t in parts.trials]
    other = tune(options, **given, trials=14, runs=tmp_path / "other", sampler_seed=1)
    assert [t.settings for t in other.trials] != [t.settings for t in whole.trials]


def test_trials_that_are_there_count(options):
    told = []
    tune(options, trials=3)
    tuning = tune(options, trials=2, after=lambda trial, so_far: told.append(trial))
    assert (len(tuning.trials), told) == (3, [])


def test_ctrl_c_loses_the_running_trial_only_and_it_is_tried_again(options, tmp_path):
    class Interrupts(Watcher):
        def start(self, seed, number, config):
            if number == "trial 3 of 4":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(options, watcher=Interrupts())
    resumed, whole = tune(options), tune(options, runs=tmp_path / "whole")
    assert [t.settings for t in resumed.trials] == [t.settings for t in whole.trials]
    assert [t.number for t in resumed.trials] == [1, 2, 4, 5]


def test_kill_9_loses_the_running_trial_only(options, empty_folder):
    """In a process that stops in its second trial, and is killed."""
    given = {**options, "search": {"stop": [False, True]}, "search_file": "none", "sampler": "grid", "trials": 2}
    code = f"import registry; registry.tune('shift', 'custom', **{given | {'data': str(options['data'])}!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(registry.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not Path("stopped").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    Path("go").touch()
    states = [trial.state.name for trial in the_study().get_trials()]
    assert states == ["COMPLETE", "RUNNING"]
    tuning = registry.tune("shift", "custom", **given)
    assert [(trial.number, trial.settings["stop"]) for trial in tuning.trials] == [(1, False), (3, True)]


def the_study():
    """Return the one study below `runs`."""
    (place,) = Path("runs/tune").iterdir()
    return optuna.load_study(study_name=place.name, storage=f"sqlite:///{place / 'study.db'}")


def test_a_trial_that_another_process_is_at_counts_and_is_left_alone(options):
    tune(options, trials=1)
    trial = the_study().ask({"offset": optuna.distributions.FloatDistribution(-2.0, 2.0)})
    trial.set_user_attr("process", [socket.gethostname(), os.getppid()])
    assert len(tune(options, trials=3).trials) == 2
    assert the_study().get_trials()[1].state.name == "RUNNING"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seeds": [2]}, "seeds"),
        ({"search": {"batch_size": [4, 8]}}, "search space"),
        ({"config": {"epochs": 2}}, "settings"),
    ],
)
def test_a_study_of_something_else_is_refused(options, change, part):
    tune(options, study="mine", trials=1)
    with pytest.raises(InputError, match=f"the study 'mine' in sqlite.* is of another {part}: name a new one with"):
        tune(options, study="mine", **change)
    assert len(tune(options, study="mine", trials=1).trials) == 1


def test_a_study_of_other_data_or_another_model_is_refused(options, tmp_path):
    tune(options, study="mine", trials=1)
    other = feature_file(tmp_path, name="other.pkl", audio=lambda audio: audio + 1)
    with pytest.raises(InputError, match="is of another data:"):
        tune(options, study="mine", data=other)
    (tmp_path / "shift.py").write_text(MODEL + "\n")
    with pytest.raises(InputError, match="is of another model:"):
        tune(options, study="mine")


def test_another_storage(options, tmp_path):
    storage = f"sqlite:///{tmp_path / 'of mine.db'}"
    tuning = tune(options, storage=storage, study="mine", trials=2)
    assert len(optuna.load_study(study_name="mine", storage=storage).trials) == 2
    assert tuning.storage == storage
    assert not (tuning.folder / "study.db").exists()
    for broken in ("nonsense", "nonsense://x", f"sqlite:///{tmp_path / 'no' / 'folder.db'}"):
        with pytest.raises(InputError, match="cannot be used"):
            tune(options, storage=broken)


def test_optuna_is_an_extra(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r'needs the package optuna .*: pip install "selfmm-plugin\[tune\]"'):
        tune(options)


def test_the_callers_logging_is_left_as_it_was(options):
    before = optuna.logging.get_verbosity()
    tune(options, trials=1)
    assert optuna.logging.get_verbosity() == before


# --- files, and the command


def test_the_files(options):
    tuning = tune(options, trials=12, figure="picture.svg", search={"batch_size": [4, 8]})
    best = json.loads(tuning.config_file.read_text("utf-8"))
    assert best["config"] == {**tuning.best.settings, "epochs": 1, "learning_rate": 0.0} | (
        {} if tuning.best.settings["batch_size"] != 32 else {"batch_size": 32}
    )
    assert "the test split is not read" in best["tuned"]["selection"]
    table = pd.read_csv(tuning.folder / "trials.csv")
    assert list(table["valid_mae"]) == [trial.valid_mae for trial in tuning.trials]
    assert Path("picture.svg").read_text("utf-8").startswith("<?xml")
    assert sum(tuning.importance.values()) == pytest.approx(1)
    assert next(iter(tuning.importance)) == "offset"


def test_the_picture(options):
    tuning = tune(options, trials=12, search={"batch_size": [4, 8]})
    history, importance = draw(tuning).axes
    best = next(line for line in history.lines if line.get_label() == "best so far").get_ydata()
    scores = [trial.valid_mae for trial in tuning.trials if trial.status == "ok"]
    assert list(best[:-1]) == list(np.minimum.accumulate(scores))
    assert [label.get_text() for label in importance.get_yticklabels()] == list(tuning.importance)
    assert len(draw(tune(options, trials=1, study="short")).axes) == 1


@pytest.fixture
def command(options) -> list:
    """The same search as a command line."""
    given = ["tune", "-m", "shift", "-d", "custom", "--label-range", 3, "--data", options["data"], "--epochs", 1]
    return [*given, "--plugin", options["plugins"][0], "--trials", 3]


def test_what_the_command_prints_and_says_to_type_next(benchmark, command):
    code, out, err = benchmark(*command)
    assert code == 0
    for word in ("shift on custom, best of 3 trials (3 ok)", "validation MAE", "offset=", "the test split is not read"):
        assert word in out
    assert "seed 1111 (trial 2 of 3)" in err
    assert re.search(r"trial 3 \(3 of 3\): validation MAE \d\.\d{4} in epoch 1; best \d\.\d{4}, of trial \d", err)
    code, out, _ = benchmark(*shlex.split(out.splitlines()[-1])[1:])
    assert code == 0
    assert "shift on custom, test split" in out
    assert "mean ± sd" in out


def test_json_and_nothing_else(benchmark, command):
    code, out, _ = benchmark(*command, "--json")
    tuning = json.loads(out)
    assert code == 0
    assert tuning["best"] in tuning["trials"]
    assert len(tuning["trials"]) == 3


def test_describe_shows_what_is_searched(benchmark):
    code, out, _ = benchmark("describe", "text_only")
    assert code == 0
    assert "0.0001 to 0.01, log" in out.split("what benchmark tune searches")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", 0], "--trials must be at least 1, got 0"),
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--sampler", "tp"], "unknown sampler 'tp', did you mean 'tpe'?"),
        (["--search-set", "ofset=0,1"], "unknown key 'ofset', did you mean 'offset'?"),
        (["--search-set", "offset=1..0"], "a range goes from low to high, got 1 to 0"),
        (["--search-set", "offset=-1..1:log"], "a range with log must be of positive numbers"),
        (["--search-set", "offset=a..b"], "--search-set takes numbers as offset=LOW..HIGH"),
        (["--search-set", "batch_size=1..2.5"], "'batch_size' is an integer, got 1 to 2.5"),
        (["--search-set", "batch_size=0,1"], "'batch_size' must be at least 1, got 0"),
        (["--search-set", "batch_size=8,8"], "'batch_size' has a value twice"),
        (["--search-set", "fault=0..1"], "'fault' is no number, and has no range"),
        (["--search-set", "offset"], "--search-set takes KEY=LOW..HIGH[:log] or KEY=A,B,C, got 'offset'"),
        (["--search-set", "offset=1,2", "--set", "offset=1"], "offset is set, and to be searched as well"),
        (["--set", "offset=1"], "shift declares nothing to search"),
        (["--search", "none"], "name keys with --search-set"),
        (["--search", "no.toml"], "search space file no.toml cannot be read"),
        (["--figure", "a.txt"], "--figure a.txt must end in .png, .pdf, .svg"),
        (["--study", "a/b"], "--study is made of letters"),
    ],
)
def test_wrong_input_is_one_sentence(benchmark, command, arguments, said):
    code, out, err = benchmark(*command, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not list(Path.cwd().rglob("*.db"))
