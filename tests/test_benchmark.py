"""`registry.run`: seeds, finished and failed runs, what is written, and what a model needs of its data."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import registry
from registry import InputError, Result, benchmark, load_run
from registry.data.feature_file import read_feature_file
from registry.tables import artifact_tables
from registry.training import Watcher
from tests.helpers import feature_file

QUICK = {"epochs": 2, "batch_size": 4, "update_epochs": 1}


@pytest.fixture
def quick(tmp_path, encoder):
    """Run `self_mm` on a small file in `tmp_path`; arguments as for `registry.run`."""

    def run(data: Path | None = None, model: str = "self_mm", *, config=None, runs="runs", **options) -> Result:
        data = data or feature_file(tmp_path)
        return registry.run(
            model,
            options.pop("dataset", "custom"),
            data=data,
            text_encoder=options.pop("text_encoder", encoder),
            label_range=3.0,
            runs=tmp_path / runs,
            config={**QUICK, **(config or {})},
            device="cpu",
            **options,
        )

    return run


def plugin(folder: Path, forward: str, name: str = "mean", *, options: str = "", dims: str = "{}") -> str:
    """Write a plugin with one model over audio; `forward` is its body, with `mean` (B, 5) and `self.linear`."""
    options += "" if "needs" in options else ', needs=("audio",)'
    text = f"""
import torch
from registry import FusionOutput, register_model

@register_model("{name}", summary="mean of audio"{options})
class Model(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.linear = torch.nn.Linear(data.dims["audio"], 1)
        self.feature_dims = {dims}

    def forward(self, batch):
        mean = batch.audio.sum(1) / batch.audio_lengths[:, None]
        {forward}
"""
    (folder / f"{name}.py").write_text(text)
    return str(folder / f"{name}.py")


class Notes(Watcher):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def weights(result: Result, number: int = 0) -> bytes:
    return (result.runs[number].folder / "model.safetensors").read_bytes()


# --- seeds and folders


def test_mean_and_sample_deviation_over_seeds(quick):
    result = quick(seeds=[3, 1])
    values = [run.metrics["MAE"] for run in result.runs]
    assert [(run.seed, run.status, run.reason) for run in result.runs] == [(3, "ok", None), (1, "ok", None)]
    assert values[0] != values[1]
    assert result.mean["MAE"] == pytest.approx(np.mean(values))
    assert result.std["MAE"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert [run.folder for run in result.runs] == [result.folder / "3", result.folder / "1"]


def test_one_seed_has_no_deviation(quick):
    assert quick().std is None


def test_same_seed_same_bits_wherever_and_whenever(quick):
    first = quick(runs="a", seeds=[7, 8])
    torch.rand(3)
    again = quick(runs="b", seeds=[8, 7])
    assert weights(first, 0) == weights(again, 1)
    assert weights(first, 0) != weights(first, 1)
    assert first.runs[0].metrics == again.runs[1].metrics


def test_the_callers_random_state_and_folder_are_left_alone(quick, empty_folder):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    quick()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert list(empty_folder.iterdir()) == []


def test_a_finished_run_is_found_and_force_repeats_it(quick):
    folder = quick().runs[0].folder
    written = (folder / "metrics.json").stat().st_mtime_ns
    notes = Notes()
    again = quick(watcher=notes)
    assert (folder / "metrics.json").stat().st_mtime_ns == written
    assert any("seed 1111 is finished already" in note for note in notes.notes)
    forced = quick(force=True)
    assert (folder / "metrics.json").stat().st_mtime_ns > written
    assert again.mean == forced.mean


@pytest.mark.parametrize("seeds", [[], [1, 1], [1.0], ["1"], 1, [2**32], [-1]])
def test_seeds_that_make_no_sense(quick, seeds):
    with pytest.raises(InputError, match="seeds must be whole numbers from 0 to"):
        quick(seeds=seeds)


def test_an_edited_plugin_is_another_model(quick, tmp_path):
    first = quick(model="mean", plugins=[plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0])")])
    edited = quick(model="mean", plugins=[plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0] * 100)")])
    assert first.folder != edited.folder
    assert first.mean != edited.mean


def test_a_metric_without_an_answer_is_null_in_files_and_nan_in_python(quick, tmp_path):
    result = quick(feature_file(tmp_path, test={"regression_labels": lambda y: y * 0}))
    assert '"Non0_acc_2": null' in (result.runs[0].folder / "metrics.json").read_text()
    assert '"Non0_acc_2": null' in result.to_json()
    assert np.isnan(result.mean["Non0_acc_2"])


# --- the test split is read once, and never chosen by


def test_test_labels_change_metrics_and_nothing_else(quick, tmp_path):
    one = quick(runs="a")
    flipped = feature_file(tmp_path, name="flipped.pkl", test={"regression_labels": lambda y: -y})
    other = quick(flipped, runs="b")
    tables = [load_run(result.runs[0].folder) for result in (one, other)]
    assert tables[0].predictions["prediction"].tolist() == tables[1].predictions["prediction"].tolist()
    assert tables[0].best_epoch == tables[1].best_epoch
    assert tables[0].metrics["MAE"] != tables[1].metrics["MAE"]


# --- failures


def test_a_failed_run_has_its_reason_and_no_folder(quick, tmp_path):
    bad_when = "torch.initial_seed() == 2 and not self.training"
    file = plugin(tmp_path, f"return FusionOutput(self.linear(mean)[:, 0] * (float('nan') if {bad_when} else 1))")
    result = quick(model="mean", plugins=[file], seeds=[1, 2, 3])
    assert [run.status for run in result.runs] == ["ok", "failed", "ok"]
    assert "validation MAE nan" in result.runs[1].reason
    assert (result.runs[1].folder, result.runs[1].metrics) == (None, {})
    assert result.mean["MAE"] == pytest.approx(np.mean([result.runs[i].metrics["MAE"] for i in (0, 2)]))
    assert sorted(path.name for path in result.folder.iterdir()) == ["1", "2.failed.log", "3"]
    assert (result.folder / "2.failed.log").read_text() == result.runs[1].reason + "\n"


def test_an_exception_of_one_seed_leaves_the_others(quick, tmp_path):
    forward = """
        self.calls = getattr(self, "calls", 0) + 1
        if torch.initial_seed() == 2 and self.calls > 4:
            raise ValueError("boom\\nhere\\udce9")
        return FusionOutput(self.linear(mean)[:, 0])"""
    file = Path(plugin(tmp_path, forward))
    with pytest.warns(UserWarning, match="seed 2 failed: ValueError: boom here.* \\(more in "):
        result = quick(model="mean", plugins=[str(file)], seeds=[1, 2, 3])
    failed = result.runs[1]
    assert [run.status for run in result.runs] == ["ok", "failed", "ok"]
    assert failed.reason == "ValueError: boom here\udce9"
    log = (result.folder / "2.failed.log").read_text()
    assert log.startswith("ValueError: boom here?\nepoch   1  train loss")
    assert f'File "{file}", line' in log


def short_of_memory(monkeypatch, failures: int) -> list[tuple[bool, bool]]:
    """Let the first trainings run out of memory in their second epoch; returns (graph, per_sample) of all."""
    tried, models, train = [], [], benchmark.train

    def stingy(model, *given, **named):
        assert all(former() is None for former in models), "a former model still takes memory"
        tried.append((named["graph"], named["per_sample"]))
        if len(tried) > failures:
            return train(model, *given, **named)
        models.append(weakref.ref(model))

        def fail(epoch: int, *_) -> None:
            if epoch == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

        with monkeypatch.context() as short:
            short.setattr(named["watcher"], "step", fail)
            return train(model, *given, **named)

    monkeypatch.setattr(benchmark, "train", stingy)
    return tried


def mean_of_audio(folder: Path, per_sample: bool = True) -> str:
    return plugin(folder, "return FusionOutput(self.linear(mean)[:, 0])", options=f", per_sample={per_sample}")


def test_a_gpu_that_is_too_small_is_asked_for_less(quick, tmp_path, monkeypatch):
    given = {"model": "mean", "plugins": [mean_of_audio(tmp_path)], "config": {"update_epochs": 2}, "seeds": [1, 2]}
    usual = quick(runs="usual", **given)
    tried, notes = short_of_memory(monkeypatch, 2), Notes()
    result = quick(watcher=notes, **given)
    assert tried == [(True, True), (False, True), (False, False), (False, False)]  # the second seed begins there
    assert [note for note in notes.notes if "memory" in note] == [
        f"mean, seed 1: the GPU's memory ran out; it and the seeds after it are trained {way}"
        for way in ("without recorded steps", "without recorded steps, one micro-batch at a time")
    ]
    for run in result.runs:
        assert load_run(run.folder).history["epoch"].tolist() == [1, 2]
        said = "trained without recorded steps, one micro-batch at a time: the GPU's memory had run out"
        assert said in (run.folder / "log.txt").read_text().splitlines()
    assert result.mean["MAE"] == pytest.approx(usual.mean["MAE"], abs=1e-6)


@pytest.mark.parametrize(
    ("graph", "per_sample", "config", "ways"),
    [
        (True, True, {}, [(True, True), (False, True), (False, False)]),
        (False, True, {}, [(False, True), (False, False)]),
        (True, False, {}, [(True, False), (False, False)]),
        (True, True, {"update_epochs": 1}, [(True, True), (False, True)]),  # a group is a micro-batch
        (True, True, {"clip_value": 1.0}, [(True, True), (False, True)]),  # they come one at a time anyway
    ],
)
def test_a_gpu_that_is_too_small_in_every_way(quick, tmp_path, monkeypatch, graph, per_sample, config, ways):
    file, tried = mean_of_audio(tmp_path, per_sample), short_of_memory(monkeypatch, 99)
    given = {"config": {"update_epochs": 2, **config}, "graph": graph, "watcher": Notes()}
    result = quick(model="mean", plugins=[file], **given)
    (run,) = result.runs
    assert run.reason.startswith("the GPU's memory is too small for one micro-batch of batch_size=4 at a time: make")
    assert "Tried to allocate 20.00 MiB" in run.reason
    assert ", in fail\n" in (result.folder / "1111.failed.log").read_text()  # where in the code it was
    assert tried == ways


def test_a_refusal_after_a_finished_seed_does_not_lose_it(quick, tmp_path):
    forward = "import registry\n        if torch.initial_seed() == 2: raise registry.InputError('no more')\n"
    file = plugin(tmp_path, f"{forward}        return FusionOutput(self.linear(mean)[:, 0])")
    result = quick(model="mean", plugins=[file], seeds=[1, 2, 3])
    assert [run.reason for run in result.runs] == [None, "no more", None]


def test_a_seed_that_is_mended_loses_its_log(quick, tmp_path):
    file, switch = tmp_path / "mean.py", tmp_path / "broken"
    forward = f"return FusionOutput(self.linear(mean)[:, 0] * (float('nan') if Path({str(switch)!r}).exists() else 1))"
    plugin(tmp_path, forward)
    file.write_text("from pathlib import Path\n" + file.read_text())
    switch.touch()
    assert [p.name for p in quick(model="mean", plugins=[str(file)]).folder.iterdir()] == ["1111.failed.log"]
    switch.unlink()
    assert [p.name for p in quick(model="mean", plugins=[str(file)]).folder.iterdir()] == ["1111"]


def test_a_small_table_of_clips_is_not_averaged_over_epochs(quick, tmp_path):
    few = dict.fromkeys(("train", "valid", "test"), 3)
    result = quick(feature_file(tmp_path, sizes=few, regression_labels_T=lambda _: np.zeros(3, np.float32)))
    assert len(load_run(result.runs[0].folder).table("labels")) == 6
    assert list(artifact_tables(result, 10)) == ["agreement_with_true_labels"]


def test_a_small_table_by_epoch_is_not_printed_as_one_of_the_best_epoch(quick, tmp_path):
    result = quick(seeds=[1, 2])
    assert len(load_run(result.runs[0].folder).table("label_movement")) == 6
    assert artifact_tables(result, 10) == {}


# --- source that changes


def test_another_source_of_a_file_is_another_run(quick, tmp_path):
    file, helper = (
        Path(plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0] * scale)")),
        tmp_path / "scaling.py",
    )
    file.write_text("from scaling import scale\n" + file.read_text())
    helper.write_text("scale = 1.0\n")
    first = quick(model="mean", plugins=[str(file)]).folder
    assert quick(model="mean", plugins=[str(file)]).folder == first
    (tmp_path / "unrelated.py").write_text("scale = 1.0\n")
    assert quick(model="mean", plugins=[str(file)]).folder == first
    before = quick(model="mean", plugins=[str(file)])
    helper.write_text("scale = 2.0\n")  # of the same length, within the same second
    after = quick(model="mean", plugins=[str(file)])
    assert after.folder != first
    assert after.mean["MAE"] != before.mean["MAE"]


@pytest.mark.parametrize("build", ["functools.partial(Model)", "lambda config, data: Model(config, data)"])
def test_a_models_source_is_that_of_the_file_that_announces_it(quick, tmp_path, build):
    file = Path(plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0])"))
    announced = f"SPEC = registry.ModelSpec(name='made', summary='', build={build}, needs=('audio',))\n"
    file.write_text(f"import functools\nimport registry\n{file.read_text()}\n{announced}")
    first = quick(model="made", plugins=[str(file)]).folder
    file.write_text(file.read_text() + "# other\n")
    assert quick(model="made", plugins=[str(file)]).folder != first


def test_a_packages_source_that_changed_is_said(quick, tmp_path, monkeypatch):
    package = tmp_path / "strangers_package"
    package.mkdir()
    file = Path(plugin(package, "return FusionOutput(self.linear(mean)[:, 0])"))
    monkeypatch.syspath_prepend(tmp_path)
    folder = quick(model="mean", plugins=["strangers_package.mean"]).runs[0].folder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_run(folder, plugins=["strangers_package.mean"]).model
    (file.parent / "helper.py").write_text("")
    for name in ("strangers_package.mean", "strangers_package"):
        del sys.modules[name]  # as in another process
    notes = Notes()
    assert quick(model="mean", plugins=["strangers_package.mean"], watcher=notes).runs[0].folder == folder
    assert any("is finished already" in note and "the source of model mean has changed" in note for note in notes.notes)
    with pytest.warns(UserWarning, match="the source of mean is not what it was in the run"):
        assert load_run(folder, plugins=["strangers_package.mean"]).model


def test_nothing_but_failures(quick, tmp_path):
    file = plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0] * float('inf'))")
    result = quick(model="mean", plugins=[file])
    assert (result.ok, result.mean, result.std) == ([], {}, None)
    assert '"mean": {}' in result.to_json()


# --- ULGM through the registry


def human_labels(tmp_path: Path) -> Path:
    """A file with T/A/V labels, some of them 0."""
    rng = np.random.default_rng(1)
    keys = {f"regression_labels_{task}": lambda _, n: rng.integers(-2, 3, n).astype(np.float32) for task in "TAV"}
    sizes = {"train": 8, "valid": 4, "test": 4}
    changes = {
        split: {key: (lambda old, make=make, n=n: make(old, n)) for key, make in keys.items()}
        for split, n in sizes.items()
    }
    return feature_file(tmp_path, name="human.pkl", **changes)


def test_generated_labels_move_from_the_second_epoch_on(quick):
    table = load_run(quick(config={"epochs": 3}).runs[0].folder).table("labels")
    for modality in ("text", "audio", "vision"):
        moved = (table[modality] - table["fusion"]).abs().groupby(table["epoch"]).max()
        assert moved[1] == 0
        assert moved[2] > 0
    assert table[["text", "audio", "vision"]].abs().to_numpy().max() <= 3


def test_human_supervision_trains_on_the_files_own_labels(quick, tmp_path):
    run = load_run(quick(human_labels(tmp_path), config={"supervision": "human"}).runs[0].folder)
    labels = run.table("labels")
    content = registry.load_run(run.folder).settings["data"]["tasks"]
    assert content == ["M", "T", "A", "V"]
    assert set(labels["text"]) <= {-2, -1, 0, 1, 2}
    assert labels.groupby("id")["text"].nunique().max() == 1
    assert not (run.folder / "agreement_with_true_labels.csv").exists()


def test_human_supervision_needs_human_labels(quick):
    with pytest.raises(InputError, match="supervision='human' needs the data's own labels for text, audio, vision"):
        quick(config={"supervision": "human"})


def test_agreement_with_true_labels_is_written_where_they_are_known(quick, tmp_path):
    """At the epoch that was chosen, not at the last one."""
    data = human_labels(tmp_path)
    run = load_run(quick(data, config={"early_stop": 3, "epochs": None}).runs[0].folder)
    assert run.best_epoch < len(run.history)
    chosen = run.table("labels").query(f"epoch == {run.best_epoch}")
    true = read_feature_file(data, label_range=3.0).splits["train"].labels
    table = run.table("agreement_with_true_labels").set_index("modality")
    for modality, task in (("text", "T"), ("audio", "A"), ("vision", "V")):
        row = table.loc[modality]
        assert row["MAE generated"] == pytest.approx(np.abs(chosen[modality] - true[task]).mean(), abs=1e-6)
        assert row["MAE multimodal"] == pytest.approx(np.abs(true["M"] - true[task]).mean(), abs=1e-6)
        assert row["Corr generated"] == pytest.approx(np.corrcoef(chosen[modality], true[task])[0, 1], abs=1e-5)


@pytest.mark.parametrize(("tasks", "heads"), [("M", []), ("MT", ["text"]), ("MTAV", ["audio", "text", "vision"])])
def test_tasks_pick_the_losses(quick, tasks, heads):
    from safetensors.torch import load_file

    names = load_file(quick(config={"tasks": tasks}).runs[0].folder / "model.safetensors")
    assert sorted({n.split(".")[4] for n in names if n.startswith("hook.ulgm.supervision.heads")}) == heads


def test_initials_that_two_modalities_share(quick, tmp_path):
    forward = "return FusionOutput(self.linear(mean)[:, 0], {'fusion': mean, 'text': mean, 'touch': mean})"
    file = plugin(tmp_path, forward, dims='{"fusion": 5, "text": 5, "touch": 5}')
    with pytest.raises(InputError, match="tasks cannot tell text, touch apart by their initials"):
        quick(model="mean+ulgm", plugins=[file], config={"hook.tasks": "MT"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({"hook.tasks": tasks}, "tasks must be M and any of TV, each once") for tasks in ("T", "MX", "MTT", "MA")),
        ({"hook.head_dims.txt": 9}, "'hook.head_dims' names txt, and the model has no such features"),
        ({"hook.head_dropouts": {"audio": 0.1, "eyes": 0.2}}, "'hook.head_dropouts' names eyes, and the model"),
    ],
)
def test_keys_of_a_borrowed_hook_that_fit_no_feature(quick, tmp_path, config, message):
    forward = "return FusionOutput(self.linear(mean)[:, 0], {'fusion': mean, 'text': mean, 'vision': mean})"
    file = plugin(tmp_path, forward, dims='{"fusion": 5, "text": 5, "vision": 5}')
    with pytest.raises(InputError, match=message):
        quick(model="mean+ulgm", plugins=[file], config=config)


def test_constant_unimodal_labels_agree_with_nothing(quick, tmp_path):
    sizes = {"train": 8, "valid": 4, "test": 4}
    tenths = {split: {"regression_labels_T": np.full(n, 0.1, np.float32)} for split, n in sizes.items()}
    table = load_run(quick(feature_file(tmp_path, **tenths)).runs[0].folder).table("agreement_with_true_labels")
    assert table["Corr multimodal"].tolist() == table["Corr generated"].tolist() == [0.0]


def with_features(folder: Path) -> str:
    """A plugin whose model returns features of audio."""
    forward = "return FusionOutput(self.linear(mean)[:, 0], {'fusion': mean, 'audio': mean})"
    return plugin(folder, forward, dims='{"fusion": 5, "audio": 5}')


def test_any_model_with_features_borrows_ulgm(quick, tmp_path):
    file = with_features(tmp_path)
    result = quick(model="mean+ulgm", plugins=[file])
    assert result.model == "mean+ulgm"
    assert list(load_run(result.runs[0].folder).table("labels")) == ["epoch", "id", "fusion", "audio"]
    assert quick(model="mean", hooks=["ulgm"], plugins=[file]).folder == result.folder
    assert load_run(result.runs[0].folder, plugins=[file]).model.linear.weight.shape == (1, 5)


@pytest.mark.parametrize("hook", ["ulgm", "heads"])
def test_a_model_without_features_cannot_borrow_it(quick, tmp_path, hook):
    file = plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0])")
    with pytest.raises(InputError, match=f"the hook '{hook}' needs a model that returns features named 'fusion'"):
        quick(model=f"mean+{hook}", plugins=[file])


def test_heads_are_those_of_ulgm_with_labels_that_stay(quick, tmp_path):
    """The control for ULGM, under either name."""
    file, data = with_features(tmp_path), human_labels(tmp_path)
    spellings = [("mean+heads", {}), ("mean+ulgm", {"hook.supervision": "multimodal"})]
    results = [
        quick(data, model=model, plugins=[file], config={"epochs": 3, **config}).runs[0].folder
        for model, config in spellings
    ]
    heads, ulgm = map(load_run, results)
    assert heads.history["train_loss"].tolist() == ulgm.history["train_loss"].tolist()
    assert heads.metrics == ulgm.metrics
    assert heads.summary["artifacts"] == ["labels"]
    assert heads.table("labels")["audio"].tolist() == heads.table("labels")["fusion"].tolist()


def test_self_mm_with_the_multimodal_label_in_every_modality(quick, tmp_path):
    run = load_run(quick(human_labels(tmp_path), config={"supervision": "multimodal", "epochs": 3}).runs[0].folder)
    labels = run.table("labels")
    assert (labels[["text", "audio", "vision"]].to_numpy() == labels[["fusion"]].to_numpy()).all()
    assert run.summary["artifacts"] == ["labels"]


def test_heads_of_tasks_that_are_chosen(quick, tmp_path):
    file = with_features(tmp_path)
    with pytest.raises(InputError, match="tasks must be M and any of A, each once, got 'MT'"):
        quick(model="mean+heads", plugins=[file], config={"hook.tasks": "MT"})
    with pytest.raises(InputError, match=r"unknown key 'hook\.distance'"):
        quick(model="mean+heads", plugins=[file], config={"hook.distance": "cosine"})


@pytest.mark.parametrize("model", ["mean+ulgm+heads", "mean+heads+ulgm", "self_mm+heads"])
def test_ulgm_and_its_control_at_once(quick, tmp_path, model):
    message = (
        f"'{model.partition('+')[0]}' cannot be trained with the hooks 'ulgm' and 'heads' at once: both train unimodal "
        r"heads on the same features, .* \(self_mm always trains its heads with ULGM: "
        r"its control is --set supervision=multimodal\)"
    )
    with pytest.raises(InputError, match=message):
        quick(model=model, plugins=[with_features(tmp_path)])


@pytest.mark.parametrize("model", ["self_mm+ulgm", "mean+ulgm+ulgm"])
def test_a_hook_given_twice(quick, tmp_path, model):
    file = plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0])")
    with pytest.raises(InputError, match="hook 'ulgm' cannot be added to"):
        quick(model=model, plugins=[file])


# --- what a model needs of its data


def test_a_modality_that_is_not_there(quick, tmp_path):
    blind = feature_file(tmp_path, name="blind.pkl", vision=None, vision_lengths=None)
    with pytest.raises(
        InputError, match=r"needs vision, and blind\.pkl has no key vision \(leave it out with --set mod"
    ):
        quick(blind)
    folder = quick(blind, config={"modalities": "text,audio"}).runs[0].folder
    assert load_run(folder).settings["data"]["dims"] == {"audio": 5, "text": 8}


def test_a_model_gets_what_it_needs_and_nothing_else(quick, tmp_path):
    forward = "assert batch.vision is batch.text_ids is None; return FusionOutput(self.linear(mean)[:, 0])"
    run = quick(model="mean", plugins=[plugin(tmp_path, forward)]).runs[0]
    assert run.status == "ok", run.reason
    assert load_run(run.folder).settings["data"]["dims"] == {"audio": 5}


def test_a_model_without_text_needs_no_encoder(quick, tmp_path):
    mute = feature_file(tmp_path, name="mute.pkl", raw_text=None, text_bert=None)
    result = quick(mute, config={"modalities": "audio,vision"})
    assert load_run(result.runs[0].folder).settings["text_encoder"] is None
    assert result.protocol["text encoder"] == "none"


def aligned(tmp_path: Path, **more) -> Path:
    changes = {"audio_lengths": None, "vision_lengths": None}
    longer = {name: lambda a: np.repeat(a[:, :1], 9, axis=1) for name in ("audio", "vision")}
    return feature_file(tmp_path, name="aligned.pkl", **changes, **longer, **more)


def test_alignment_is_asked_for_and_kept(quick, tmp_path):
    forward = "return FusionOutput(self.linear(mean)[:, 0])"
    file = plugin(tmp_path, forward, options=', needs=("text", "audio", "alignment")')
    with pytest.raises(InputError, match=r"mean needs word-aligned features, and features\.pkl is not aligned"):
        quick(model="mean", plugins=[file])
    with pytest.raises(InputError, match="aligned with the tokens of another text encoder than"):
        quick(aligned(tmp_path), model="mean", plugins=[file])
    assert quick(aligned(tmp_path)).protocol["data"] == "aligned"


def test_aligned_steps_stand_side_by_side_in_every_batch(quick, tmp_path):
    forward = "steps = torch.cat([batch.text, batch.audio, batch.vision], -1).sum((1, 2))\n"
    forward += "        return FusionOutput(self.linear(mean)[:, 0] + steps / batch.text_lengths)"
    file = plugin(tmp_path, forward, options=', needs=("text_features", "audio", "vision", "alignment")')

    def features(steps: int) -> dict[str, dict[str, np.ndarray]]:
        return {split: {"text": np.ones((n, steps, 2))} for split, n in (("train", 8), ("valid", 4), ("test", 4))}

    assert quick(aligned(tmp_path, **features(9)), "mean", plugins=[file], text_encoder=None).ok
    with pytest.raises(InputError, match=r"mean needs word-aligned features, and aligned\.pkl is not aligned"):
        quick(aligned(tmp_path, **features(1)), "mean", plugins=[file], text_encoder=None)


def test_whose_text_features(quick, tmp_path, encoder):
    """The file's own, unless a text encoder is named or there are none."""
    forward = "self.seen = batch.text.shape[2]; return FusionOutput(self.linear(mean)[:, 0])"
    file = plugin(tmp_path, forward, options=', needs=("audio", "text_features")')
    few = {split: {"text": np.ones((n, 9, 6))} for split, n in (("train", 8), ("valid", 4), ("test", 4))}
    having = feature_file(tmp_path, name="having.pkl", **few)
    for data, name, width, said in (
        (having, None, 6, "the file's text features, frozen"),
        (having, encoder, 8, f"{encoder}, frozen"),
        (None, encoder, 8, f"{encoder}, frozen"),
    ):
        result = quick(data, "mean", plugins=[file], text_encoder=name)
        assert load_run(result.runs[0].folder).settings["data"]["dims"]["text"] == width
        assert result.protocol["text encoder"] == said
    with pytest.raises(InputError, match="dataset 'custom' needs --text-encoder"):
        quick(None, "mean", plugins=[file], text_encoder=None)


def test_padding_is_as_long_in_every_split(quick, tmp_path):
    """Validation's longest text is shorter than train's: a model that reads padding must not see that."""
    forward = "assert batch.text.shape[1] == 4; return FusionOutput(self.linear(mean)[:, 0])"
    file = plugin(tmp_path, forward, options=', needs=("audio", "text_features", "padding")')
    texts = {"train": ["good movie"] * 8, "valid": ["good"] * 4, "test": ["bad"] * 4}
    data = feature_file(tmp_path, text_bert=None, **{split: {"raw_text": text} for split, text in texts.items()})
    run = quick(data, "mean", plugins=[file]).runs[0]
    assert run.status == "ok", run.reason
    forward = "assert batch.text_ids.shape[1] == 4; return FusionOutput(self.linear(mean)[:, 0])"
    file = plugin(tmp_path, forward, "tokens", options=', needs=("audio", "text", "padding")')
    run = quick(data, "tokens", plugins=[file]).runs[0]
    assert run.status == "ok", run.reason


def test_labels_and_text_features_are_asked_for(quick, tmp_path):
    forward = "return FusionOutput(self.linear(mean)[:, 0])"
    file = plugin(tmp_path, forward, "needs_labels", options=', needs=("audio", "T")')
    with pytest.raises(InputError, match=r"needs labels 'T', and features\.pkl has only M"):
        quick(model="needs_labels", plugins=[file])
    file = plugin(tmp_path, forward, "needs_text", options=', needs=("audio", "text_features")')
    mute = feature_file(tmp_path, name="mute.pkl", raw_text=None, text_bert=None)
    with pytest.raises(InputError, match=r"needs text_features, and mute\.pkl has no key text, text_bert or raw_text"):
        quick(mute, model="needs_text", plugins=[file])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "custom", "label_range": None}, "needs --label-range: 3 where labels lie between"),
        ({"dataset": "mosi", "label_range": 0}, "--label-range must be a positive number, got 0"),
        ({"dataset": "mosi", "label_range": 1e39}, "--label-range must be a positive number, got 1e+39"),
        ({"dataset": "mosi", "data": "~nobody_here/x.pkl"}, "~nobody_here/x.pkl does not exist"),
        ({"dataset": "demo", "data": "x.pkl"}, "'demo' makes its own data; leave out --data"),
        ({"dataset": "mosi", "data": None}, "'mosi' needs --data FILE"),
        ({"dataset": "custom", "label_range": 3, "text_encoder": None}, "'custom' needs --text-encoder: minilm"),
        ({"dataset": "mosi", "device": "gpu"}, "--device must be cpu, cuda or auto, got 'gpu'"),
        ({"dataset": "mosei2"}, "unknown dataset 'mosei2', did you mean 'mosei'?"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, encoder, empty_folder, options, message):
    with pytest.raises(InputError) as caught:
        registry.run("self_mm", **{"data": feature_file(tmp_path), "text_encoder": encoder, **options})
    assert message in str(caught.value)
    assert list(empty_folder.iterdir()) == []


def test_cuda_where_there_is_none(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="this machine has no CUDA device that torch can use; pass --device cpu"):
        registry.run("self_mm", "mosi", data=feature_file(tmp_path), text_encoder=encoder, device="cuda")


# --- what a model may do wrong


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    feature_file(tmp_path)
    settings = {**QUICK, "modalities": "audio"}
    done = registry.run(
        "self_mm", "custom", data="~/features.pkl", runs="~/runs", label_range=3.0, config=settings
    ).runs[0]
    assert done.folder.is_relative_to(tmp_path / "runs")
    assert (done.folder / "history.csv").exists()


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        ("return FusionOutput(self.linear(mean))", r"the model's prediction has shape \(4, 1\), not \(4,\)"),
        ("raise SystemExit('no GPU')", r"the model left Python with sys.exit\('no GPU'\)"),
        ("return FusionOutput(self.linear(mean)[:, 0], losses={'x': mean})", "is not a scalar"),
        ("return mean", "the model's forward returned a Tensor, not a registry.FusionOutput"),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_model_that_misbehaves_is_a_failed_run(quick, tmp_path, forward, reason):
    result = quick(model="mean", plugins=[plugin(tmp_path, forward)])
    assert result.runs[0].status == "failed"
    assert re.search(reason, result.runs[0].reason)


@pytest.mark.parametrize(
    ("needs", "message"),
    [('"audio"', "needs must be a tuple of text, .*, got 'audio'"), ('("adio",)', "got 'adio'")],
)
def test_needs_that_are_none(quick, tmp_path, needs, message):
    file = plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0])", options=f", needs={needs}")
    with pytest.raises(InputError, match=message):
        quick(model="mean", plugins=[file])


def test_numpy_and_random_are_seeded_too_and_left_as_they_were(quick, tmp_path):
    forward = "return FusionOutput(self.linear(mean)[:, 0] + float(numpy.random.rand()) + random.random())"
    file = Path(plugin(tmp_path, forward))
    file.write_text("import random\nimport numpy\n" + file.read_text())
    random.seed(3)
    np.random.seed(3)
    expected = random.Random(3).random(), np.random.RandomState(3).rand()
    values = [quick(model="mean", plugins=[str(file)], runs=runs).mean["MAE"] for runs in ("a", "b")]
    assert values[0] == values[1]
    assert (random.random(), np.random.rand()) == expected


def test_threads_get_the_numbers_they_would_get_alone(quick, tmp_path):
    noisy = "first = torch.rand(()); __import__('time').sleep(0.003); "
    noisy += "return FusionOutput(self.linear(mean)[:, 0] + first + torch.rand(()))"
    options = {"model": "mean", "plugins": [plugin(tmp_path, noisy)]}
    data = feature_file(tmp_path)
    alone = [quick(data, seeds=[seed], runs="alone", **options).mean for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: quick(data, seeds=[seed], runs=f"t{seed}", **options).mean, (1, 2)))
    assert together == alone
    assert alone[0] != alone[1]


@contextmanager
def default(what: str, value: object, normal: object):
    setter = torch.set_float32_matmul_precision if what == "matmul" else getattr(torch, f"set_default_{what}")
    setter(value)
    try:
        yield
    finally:
        setter(normal)


@pytest.mark.parametrize(
    "setting",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: default("dtype", torch.float64, torch.float32),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default("device", "meta", None),
        lambda: torch.device("meta"),
        lambda: default("matmul", "medium", "highest"),
    ],
    ids=["inference_mode", "no_grad", "default dtype", "autocast", "default device", "device context", "matmul"],
)
def test_what_the_caller_set_in_torch_changes_nothing(quick, setting):
    plain = quick(runs="plain")
    with setting():
        getters = (torch.get_default_dtype, torch.get_default_device, torch.get_float32_matmul_precision)
        before = [get() for get in getters]
        under = quick(runs="under")
        assert [get() for get in getters] == before
    assert under.runs[0].status == "ok", under.runs[0].reason
    assert weights(plain) == weights(under)


def test_a_model_may_predict_in_bfloat16(quick, tmp_path):
    file = plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0].bfloat16())")
    run = quick(model="mean", plugins=[file]).runs[0]
    assert run.status == "ok", run.reason


HOOK = """
import registry

class Hook(registry.TrainingHook):
    def __init__(self, labels):
        super().__init__()
        self.order = []
        {init}

    def observe(self, output, batch, epoch):
        self.order += batch.index.tolist()

    def artifacts(self):
        return {artifacts}

SPEC = registry.HookSpec(name="own", summary="", build=lambda config, train, dims: Hook(train.labels))
"""


def own_hook(folder: Path, init: str = "pass", artifacts: str = "{}") -> str:
    (folder / "own.py").write_text(HOOK.format(init=init, artifacts=artifacts))
    return str(folder / "own.py")


def test_each_seed_has_an_order_of_its_own(quick, tmp_path):
    file = own_hook(tmp_path, artifacts="{'order': {'row': self.order}}")
    runs = quick(model="self_mm+own", plugins=[file], seeds=[1, 2, 3]).runs
    orders = {tuple(load_run(run.folder).table("order")["row"][:8]) for run in runs}
    assert len(orders) == 3
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_a_hook_cannot_change_the_labels_of_the_training(quick, tmp_path):
    (tmp_path / "silent").mkdir()
    files = [own_hook(tmp_path, init="labels['M'].fill_(3.0)"), own_hook(tmp_path / "silent")]
    history = [load_run(quick(model="self_mm+own", plugins=[file]).runs[0].folder).history for file in files]
    assert history[0]["train_loss"].tolist() == history[1]["train_loss"].tolist()


@pytest.mark.parametrize("table", ["{}", "{'a': []}"])
def test_an_empty_table_of_a_hook_is_left_out(quick, tmp_path, table):
    result = quick(model="self_mm+own", plugins=[own_hook(tmp_path, artifacts=f"{{'nothing': {table}}}")])
    assert result.runs[0].status == "ok", result.runs[0].reason
    assert artifact_tables(result, 10) == {}


def test_a_table_that_only_some_seeds_have_is_printed_of_those(quick, tmp_path):
    rows = "[1.0] if torch.initial_seed() == 1 else []"
    file = own_hook(tmp_path, artifacts=f"{{'odd': {{'a': {rows}}}}}")
    Path(file).write_text("import torch\n" + Path(file).read_text())
    assert artifact_tables(quick(model="self_mm+own", plugins=[file], seeds=[1, 2]), 10) == {"odd": [{"a": "1.0000"}]}


def test_a_run_that_is_damaged_is_trained_again(quick):
    first = quick(seeds=[1, 2])
    os.truncate(first.runs[0].folder / "environment.json", 10)
    again = quick(seeds=[1, 2, 3])
    assert [run.status for run in again.runs] == ["ok"] * 3
    assert json.loads((first.runs[0].folder / "environment.json").read_text())
    assert again.runs[0].metrics == first.runs[0].metrics


def test_hints_about_data_and_epochs(quick, tmp_path, encoder):
    silent = feature_file(tmp_path, name="silent.pkl", vision=lambda v: v * 0)
    notes = Notes()
    quick(silent, watcher=notes, config={"epochs": 1})
    assert "vision says nothing: train has one value throughout" in notes.notes
    assert any("its best epoch, 1, is the last one allowed" in note for note in notes.notes)
    registry.run("self_mm", "mosi", data=silent, text_encoder=encoder, runs=tmp_path, config=QUICK, watcher=notes)
    assert "silent.pkl has 8 train clips, mosi as published has 1284" in notes.notes


@pytest.mark.parametrize(("label_range", "metric"), [(1.0, "Mult_acc_3"), (1.5, "Mult_acc_7")])
def test_the_range_of_the_labels_picks_the_metrics_of_a_custom_file(tmp_path, encoder, label_range, metric):
    data = feature_file(tmp_path, regression_labels=lambda labels: labels / 3)
    options = {"text_encoder": encoder, "runs": tmp_path, "config": QUICK, "label_range": label_range}
    assert metric in registry.run("self_mm", "custom", data=data, **options).mean


def test_without_a_watcher_notes_are_warnings(quick, tmp_path):
    with pytest.warns(UserWarning, match="train: audio: 1 values that are not finite"):
        quick(feature_file(tmp_path, train={"audio": lambda a: np.where(a == a.max(), np.nan, a)}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"batch_size": 3, "update_epochs": 2, "tail": "drop"}, "dropped"),  # 8 clips: 2 groups of 2, the last short
        ({"batch_size": 3, "update_epochs": 2, "tail": "step"}, "used"),
        ({"batch_size": 4, "update_epochs": 2, "tail": "drop"}, "there are none"),
        ({"batch_size": 4, "update_epochs": 4, "tail": "drop"}, "used"),  # no group is full
    ],
)
def test_the_protocol_says_what_became_of_the_tail(quick, config, said):
    assert quick(config={**config, "epochs": 1}).protocol["micro-batches that fill no group at an epoch's end"] == said


def test_the_protocol_says_another_range_and_whose_preset(tmp_path, encoder):
    options = {"data": feature_file(tmp_path), "text_encoder": encoder, "runs": tmp_path, "config": QUICK}
    published = registry.run("self_mm", "mosi", **options).protocol
    wider = registry.run("self_mm", "mosi", label_range=5, **options).protocol
    custom = registry.run("self_mm", "custom", label_range=5, **options).protocol
    assert (published["labels"], published["preset"]) == ("within ±3", "mmsa")
    assert wider["labels"] == "within ±5, not ±3"
    assert (custom["labels"], custom["preset"]) == ("within ±5", "mmsa (its values for mosi)")


def test_an_input_that_needs_do_not_name_says_so(quick, tmp_path):
    file = plugin(tmp_path, "return FusionOutput(self.linear(mean)[:, 0])", options=', needs=("vision",)')
    assert (
        "audio is not among the inputs that the model's needs name: vision"
        in quick(model="mean", plugins=[file]).runs[0].reason
    )


def test_the_protocol_names_changed_settings(quick):
    changed = quick(config={"H": 2.0}).protocol["changed settings"]
    assert "label_range=2.0" in changed
    assert "epochs=2" in changed
    assert "early_stop" not in changed


def test_another_source_of_a_dataset_is_another_run(tmp_path, encoder):
    file = tmp_path / "mine.py"
    text = """
from registry import DatasetSpec
from registry.data.demo import generate

def make():
    made = generate()
    for split in made.splits.values():
        split.audio *= {scale}
    return made

SPEC = DatasetSpec(name="mine", summary="", label_range=3.0, generate=make)
"""
    folders = []
    for scale in (1, 5, 5):
        file.write_text(text.format(scale=scale))
        options = {
            "text_encoder": encoder,
            "runs": tmp_path / "runs",
            "plugins": [file],
            "config": QUICK | {"epochs": 1},
        }
        folders.append(registry.run("self_mm", "mine", **options).folder)
    assert folders[0] != folders[1] == folders[2]


def test_a_lone_module_in_the_working_folder_is_told_apart_by_its_source(quick, tmp_path, monkeypatch, empty_folder):
    file = Path(plugin(empty_folder, "return FusionOutput(self.linear(mean)[:, 0])", "lone_mean"))
    first = quick(model="lone_mean", plugins=["lone_mean"]).folder
    del sys.modules["lone_mean"]  # as in another process
    file.write_text(file.read_text().replace("[:, 0]", "[:, 0] * 2.0"))
    assert quick(model="lone_mean", plugins=["lone_mean"]).folder != first
    monkeypatch.delitem(sys.modules, "lone_mean")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ModelSpec(name='m', summary='', build=print, needs=lambda c: c.typo)", "needs of model 'm' fails: Attribute"),
        ("ModelSpec(name='m', summary='', build=print, needs=5)", "needs must be a tuple of .*, got 5"),
        (
            "ModelSpec(name='m', summary='', build=print, hooks='ulgm')",
            "ModelSpec: hooks: Input should be a valid tuple",
        ),
        ("ModelSpec(name='m', summary='', build=print, hook=())", "ModelSpec: hook: Unexpected keyword"),
        (
            "ModelSpec(name='m', summary='', build=print, hooks=('ulgm',), hook_config=lambda c: 1 / 0)",
            "the configuration of model 'm' fails: ZeroDivisionError",
        ),
    ],
)
def test_faults_of_a_spec_say_whose_they_are(quick, tmp_path, spec, message):
    (tmp_path / "m.py").write_text(f"from registry import ModelSpec\nSPEC = {spec}\n")
    with pytest.raises(InputError, match=message):
        quick(model="m", plugins=[tmp_path / "m.py"])


@pytest.mark.parametrize(
    ("generate", "message"),
    [("lambda: exit(0)", "fails: SystemExit: 0"), ("lambda: 5", "must return a registry.Feature")],
)
def test_faults_of_a_generated_dataset_say_whose_they_are(tmp_path, encoder, generate, message):
    spec = f"SPEC = DatasetSpec(name='mine', summary='', label_range=3.0, generate={generate})"
    (tmp_path / "mine.py").write_text(f"from registry import DatasetSpec\n{spec}\n")
    with pytest.raises(InputError, match=f"generate of dataset 'mine' {message}"):
        registry.run("self_mm", "mine", text_encoder=encoder, plugins=[tmp_path / "mine.py"], runs=tmp_path / "runs")


def test_a_model_may_do_what_it_likes_with_its_facts_and_the_working_folder(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = "import os; os.chdir('/'); return FusionOutput(self.linear(mean)[:, 0])"
    file = Path(plugin(tmp_path, body))
    file.write_text(file.read_text().replace("__init__()\n", "__init__()\n        data.dims['fusion'] = object()\n"))
    result = quick(model="mean", plugins=[file], seeds=[1, 2], runs=Path("here").absolute().relative_to(tmp_path))
    for run in result.ok:
        assert load_run(run.folder).settings["data"]["dims"] == {"audio": 5}
    assert len(result.ok) == 2
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_not_of_a_run_is_never_replaced(quick, is_file):
    target = quick().runs[0].folder
    if is_file:
        shutil.rmtree(target)
        target.write_text("precious")
    else:
        (target / "notes.md").write_text("precious")
    with pytest.raises(InputError, match="move it away"):
        quick(force=True)
    assert (target if is_file else target / "notes.md").read_text() == "precious"


def test_the_protocol_says_whether_text_is_frozen(quick):
    assert quick().protocol["text encoder"].endswith(", fine-tuned")
    frozen = quick(config={"learning_rate_bert": 0.0})
    assert frozen.protocol["text encoder"].endswith(", frozen")
    assert quick(config={"learning_rate_bert": 0.0}).protocol == frozen.protocol  # found, not trained


def test_one_setting_is_one_run(quick):
    assert quick(config={"tasks": "MTAV"}).folder == quick().folder


def test_numpys_numbers_and_one_hook_by_name_are_accepted(quick, tmp_path):
    assert quick(config={"epochs": np.int64(2)}).folder == quick().folder
    with pytest.raises(InputError, match="always trained with it"):
        quick(hooks="ulgm")


def test_bf16_is_another_run_that_its_folder_its_table_and_its_model_tell(quick, encoder):
    options = {"text_encoder": encoder, "config": {"epochs": 1}}
    plain, lowered = quick(**options), quick(precision="bf16", **options)
    assert plain.folder != lowered.folder
    assert [result.protocol["precision"] for result in (plain, lowered)] == [
        "float32",
        "text encoder in bf16, weights float32",
    ]
    run = registry.load_run(lowered.runs[0].folder)
    assert run.settings["precision"] == "bf16"
    assert run.model.encoders["text"].dtype == torch.bfloat16
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}
    assert quick(precision="fp32", **options).folder == plain.folder


def test_a_model_that_trains_no_text_encoder_has_no_bf16(quick):
    options = {"model": "lf_dnn", "config": {"epochs": 1}}
    with pytest.warns(UserWarning, match="lf_dnn trains no text encoder, for which bf16 is: it is trained in fp32"):
        lowered = quick(precision="bf16", **options)
    assert lowered.folder == quick(**options).folder


@pytest.mark.parametrize(("precision", "said"), [("fp16", "one of fp32, tf32, bf16"), ("tf32", "is a GPU's")])
def test_a_precision_that_is_none_or_not_here(quick, precision, said):
    with pytest.raises(InputError, match=said):
        quick(precision=precision)


def test_a_processor_that_imitates_bf16_is_told_of(quick, encoder, monkeypatch):
    monkeypatch.setattr(benchmark, "_lacks_bf16", lambda: True)
    with pytest.warns(UserWarning, match="no bf16 arithmetic"):
        quick(precision="bf16", text_encoder=encoder, config={"epochs": 1})
