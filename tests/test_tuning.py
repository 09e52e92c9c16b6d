"""The search for hyper-parameters: what it tries, what it scores, and that it goes on where it was left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import registry
from registry import Range
from registry.errors import BenchmarkError, InputError
from registry.training import Watcher
from registry.tuning_figure import draw
from tests.helpers import feature_file

MODEL = """
import time
import torch
from registry import FusionOutput, Rates, register_model

class Settings(Rates):
    offset: float = 0.0
    fault: str = "none"
    wait: float = 0.0

@register_model("shift", summary="predicts a constant", config=Settings, search={"offset": {"low": -2.0, "high": 2.0}})
class Shift(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.offset, self.wait, self.feature_dims = torch.nn.Parameter(torch.tensor(config.offset)), config.wait, {}
        if config.fault == "raises":
            raise RuntimeError("no such luck")
        if config.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.scale = float("nan") if config.fault == "nan" else 1.0

    def forward(self, batch):
        time.sleep(self.wait)
        return FusionOutput(self.offset.expand(len(batch)) * self.scale)
"""


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


# --- going on


@pytest.mark.parametrize("sampler", ["tpe", "random"])
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


def test_kill_9_loses_the_running_trial_only(options, tmp_path, empty_folder):
    """With the same settings in a process that is killed in its second trial, which waits."""
    space = {"search": {"wait": [0.0, 60.0]}, "search_file": "none", "sampler": "grid", "sampler_seed": 1}
    given = {**options, **space, "data": str(options["data"])}
    code = f"import registry; registry.tune('shift', 'custom', **{given!r}, after=lambda *_: print('done', flush=True))"
    environment = {**os.environ, "PYTHONPATH": str(Path(registry.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "done\n"
    study = open_study()
    while not any(trial.state.name == "RUNNING" and trial.params for trial in study.get_trials(deepcopy=False)):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    make_waiting_short(options)
    assert open_study().get_trials(deepcopy=False)[1].state.name == "RUNNING"
