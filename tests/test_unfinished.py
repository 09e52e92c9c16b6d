"""A training that is interrupted anywhere goes on after its last epoch, and ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import registry
from registry.errors import InputError
from registry.plugins import Plugins
from registry.training import Epoch, Watcher
from registry.unfinished import Unfinished, claim, place_of
from tests.helpers import feature_file

SIZES = {"train": 24, "valid": 8, "test": 8}
MODELS = sorted(entry.name for entry in Plugins().entries("model") if not entry.name.startswith("mmsa_"))
UNIMODAL = {f"regression_labels_{task}": lambda labels: labels for task in "TAV"}


class Interrupting(Watcher):
    """Interrupts at an epoch's end, after it is kept where `late`, and remembers what it is told."""

    def __init__(self, epoch: int | None = None, step: int = 1) -> None:
        self.at = (epoch, step)
        self.notes: list[str] = []
        self.resumed = 0
        self.epochs: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def resume(self, history: list[Epoch]) -> None:
        self.resumed = len(history)

    def epoch(self, record: Epoch) -> None:
        self.epochs.append(record.epoch)

    def step(self, epoch: int, step: int, steps: int) -> None:
        if (epoch, step) == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def every_epoch(monkeypatch):
    monkeypatch.setattr(Unfinished, "due", lambda self, parts: not self.fault)


@pytest.fixture
def train(tmp_path, encoder):
    """Train on a small file; two runs with one name share a folder."""
    labels = {f"regression_labels_{task}": [0.5, -1.0] * 12 for task in "TAV"}
    own = {split: {key: values[:n] for key, values in labels.items()} for split, n in SIZES.items()}
    data = feature_file(tmp_path, sizes=SIZES, **own)

    def run(name: str, model: str = "self_mm", watcher: Watcher | None = None, **options):
        config = {"batch_size": 4, "epochs": 5, **options.pop("config", {})}
        given = {"data": data, "label_range": 3.0, "text_encoder": encoder, "device": "cpu", "runs": tmp_path / name}
        return registry.run(model, "custom", config=config, watcher=watcher or Interrupting(), **given, **options)

    return run


def content(result) -> dict[str, object]:
    """Everything of a run that must not depend on interruptions."""
    folder = result.runs[0].folder
    tables = {path.name: path.read_bytes() for path in folder.glob("*.csv") if path.name != "history.csv"}
    history = registry.load_run(folder).history.drop(columns=["train_seconds", "valid_seconds"])
    summary = json.loads((folder / "metrics.json").read_text())
    return {**tables, "history": history.to_csv(), "summary": summary, "w": (folder / "model.safetensors").read_bytes()}


@pytest.mark.parametrize("model", [*MODELS, "tfn+ulgm", "lf_dnn+heads"])
def test_every_model_goes_on_to_the_last_bit(train, every_epoch, model):
    whole = train("whole", model)
    assert whole.runs[0].status == "ok", whole.runs[0].reason
    for interrupted_in in (2, 4):
        watcher = Interrupting(interrupted_in)
        with pytest.raises(KeyboardInterrupt):
            train("parts", model, watcher)
        assert watcher.notes[-1] == f"seed 1111 was interrupted: epochs 1 to {interrupted_in - 1} are kept"
    watcher = Interrupting()
    parts = train("parts", model, watcher)
    assert (watcher.resumed, watcher.epochs) == (3, [4, 5])
    assert content(parts) == content(whole)
    assert not place_of(parts.runs[0].folder).exists()
    assert "taken up after epoch 3, where it had been interrupted" in (parts.runs[0].folder / "log.txt").read_text()


def test_rates_and_patience_of_a_scheduler_go_on(train, every_epoch):
    config = {"scheduler": "plateau", "scheduler_patience": 0, "learning_rate": 0.5, "epochs": 8, "early_stop": 8}
    whole = train("whole", "lf_dnn", config=config)
    for epoch in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            train("parts", "lf_dnn", Interrupting(epoch), config=config)
    assert content(train("parts", "lf_dnn", config=config)) == content(whole)


def test_interrupted_before_anything_is_kept(train, every_epoch, tmp_path):
    watcher = Interrupting(1)
    with pytest.raises(KeyboardInterrupt):
        train("parts", watcher=watcher)
    assert watcher.notes[-1] == "seed 1111 was interrupted: no epoch is kept"
    assert not list((tmp_path / "parts").rglob("*")), "no empty folders stay"


def interrupt(train, epoch: int = 3, **options) -> Path:
    """Interrupt a training, and return the folder that keeps it."""
    with pytest.raises(KeyboardInterrupt):
        train("parts", watcher=Interrupting(epoch), **options)
    (place,) = (train("whole").folder.parents[3] / "parts").rglob(".1111.unfinished")
    return place


@pytest.mark.parametrize("file", ["state.safetensors", "best"])
def test_a_single_bit_that_flips_is_noticed(train, every_epoch, file):
    place = interrupt(train)
    (path,) = place.glob(f"{file}*")
    content = bytearray(path.read_bytes())
    content[len(content) * 7 // 10] ^= 1
    path.write_bytes(content)
    watcher = Interrupting()
    assert content_of_the_whole(train, watcher)
    assert any("is damaged" in note for note in watcher.notes)


def content_of_the_whole(train, watcher: Watcher) -> bool:
    return content(train("parts", watcher=watcher)) == content(train("whole"))


def test_a_folder_in_the_place_of_what_is_kept(train, every_epoch):
    place = interrupt(train)
    path = place / "state.safetensors"
    path.unlink()
    path.mkdir()
    assert content_of_the_whole(train, Interrupting())


@pytest.mark.parametrize("file", ["state.safetensors", "best"])
@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None], ids=["empty", "other", "absent"])
def test_what_is_damaged_is_not_used(train, every_epoch, file, damage):
    place = interrupt(train)
    (path,) = place.glob(f"{file}*")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    watcher = Interrupting()
    result = train("parts", watcher=watcher)
    assert watcher.epochs == [1, 2, 3, 4, 5]
    assert content(result) == content(train("whole"))
    if path.name == "state.safetensors" and damage is None:
        return
    assert any("trained from the start" in note and "damaged" in note for note in watcher.notes)


def test_another_source_is_not_taken_up(train, every_epoch):
    place = interrupt(train)
    run = place.with_name("1111")
    with claim(run, {"sources": {"model self_mm": "another"}}) as unfinished:
        unfinished.restore(None)  # type: ignore[arg-type]
        assert "the source of the model" in unfinished.refused
    assert not place.exists()


def test_force_begins_anew_and_goes_on_where_it_was_itself_interrupted(train, every_epoch):
    interrupt(train)
    watcher = Interrupting(4)
    with pytest.raises(KeyboardInterrupt):
        train("parts", watcher=watcher, force=True)
    assert watcher.epochs == [1, 2, 3]
    watcher = Interrupting()
    train("parts", watcher=watcher, force=True)
    assert watcher.epochs == [4, 5]


def test_a_model_that_hides_its_state_is_not_kept(train, every_epoch, tmp_path):
    plugin = tmp_path / "counting.py"
    plugin.write_text(
        "from registry import HookSpec, TrainingHook\n"
        "class Counting(TrainingHook):\n"
        "    def __init__(self, config, train, dims):\n"
        "        super().__init__()\n"
        "        self.seen = []\n"
        "    def end_epoch(self, epoch):\n"
        "        self.seen.append(epoch)\n"
        "SPEC = HookSpec(name='counting', summary='Counts.', build=Counting)\n"
    )
    watcher = Interrupting(3)
    with pytest.raises(KeyboardInterrupt):
        train("parts", "lf_dnn+counting", watcher, plugins=[str(plugin)])
    said = (
        "an interruption would lose this seed's epochs: training changes Counting.seen, which no progress_state tells"
    )
    assert [note for note in watcher.notes if "interruption" in note] == [said]
    assert watcher.notes[-1] == "seed 1111 was interrupted: no epoch is kept"


def test_a_full_disk_stops_the_keeping_and_not_the_training(train, every_epoch, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("registry.unfinished.save_file", full)
    watcher = Interrupting()
    result = train("parts", watcher=watcher)
    assert result.runs[0].status == "ok"
    (note,) = (note for note in watcher.notes if "would lose" in note)
    assert note.endswith("cannot be written (No space left on device)")
    assert not list((result.folder).glob(".*"))


def test_a_run_that_cannot_be_written_is_not_trained_again(train, every_epoch, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        failed = train("parts")
    assert failed.runs[0].status == "failed"
    assert "No space left on device" in (failed.runs[0].reason or "")
    watcher = Interrupting()
    assert train("parts", watcher=watcher).runs[0].status == "ok"
    assert watcher.resumed == 5


def test_a_loss_that_is_not_finite_leaves_nothing(train, every_epoch, tmp_path):
    config = {"learning_rate_other": 1e36, "learning_rate_audio": 1e36, "scheduler": "none"}
    assert train("parts", config=config).runs[0].status == "failed"
    assert not list((tmp_path / "parts").rglob(".1111*"))


def test_two_processes_on_one_seed(train, tmp_path):
    folder = train("whole").runs[0].folder
    holder = (
        "import sys\nfrom pathlib import Path\nfrom registry.unfinished import claim\n"
        "with claim(Path(sys.argv[1]), {}):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", holder, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    before = content(train("whole"))
    with pytest.raises(InputError, match=f"another process is training {folder}: wait for it"):
        train("whole", force=True)
    for seeds in ([1112, 1111], [1111, 1112]):
        both = train("whole", seeds=seeds, force=True)
        assert {run.seed: run.status for run in both.runs} == {1111: "failed", 1112: "ok"}
    assert not list(folder.parent.glob("*.failed.log"))
    process.communicate("")
    assert content(train("whole")) == before
    assert train("whole", force=True).runs[0].status == "ok"


def test_a_link_in_the_place_of_what_is_kept(train, tmp_path):
    folder = train("whole").runs[0].folder
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "state.safetensors").write_text("precious")
    place_of(folder).symlink_to(mine)
    with pytest.raises(InputError, match="is a link to somewhere else: remove it"):
        train("whole", force=True)
    assert (mine / "state.safetensors").read_text() == "precious"


def test_facts_that_do_not_fit_are_damage(train, every_epoch):
    place = interrupt(train)
    path = place / "state.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    for change in ({"best_epoch": 7}, {"best_epoch": "../1"}, {"history": [{}]}, {"history": 3}):
        place.mkdir(exist_ok=True)  # it went with what was damaged
        save_file(tensors, path, {"facts": json.dumps({**facts, **change})})  # with the checksum that fits
        with claim(place.with_name("1111"), {}) as unfinished:
            assert unfinished.restore(None) is None  # type: ignore[arg-type]
            assert "is damaged" in unfinished.refused


def test_what_a_killed_process_had_begun_to_write_is_removed(train, tmp_path):
    folder = train("whole").runs[0].folder
    half = folder.with_name(".1111.0a1b2c3d")
    half.mkdir()
    (half / "config.json").write_text("{")
    moved = folder.with_name(".1111.0a1b2c3d.old")
    folder.rename(moved)  # killed between two renamings: the former run is still whole
    watcher = Interrupting()
    train("whole", watcher=watcher)
    assert watcher.epochs == []
    assert not list(folder.parent.glob(".1111.*"))


def test_keeping_takes_a_twentieth_of_the_time_at_most(tmp_path):
    unfinished = Unfinished(tmp_path)
    unfinished._cost = 2.0
    now = time.monotonic()
    for ago, due in ((37.9, False), (38.1, True)):
        unfinished._last = now - ago
        assert unfinished.due(None) == due  # type: ignore[arg-type]


def kill_at_random(command: list[str], kills: int, draw: random.Random, longest: float) -> int:
    """Start a command and kill it, so often; return how many kills hit it."""
    hits = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "seed 1111 (" in line:
                break
        time.sleep(draw.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
        process.stderr.close()
    return hits


@pytest.mark.parametrize(("kills", "epochs"), [(2, 8), pytest.param(20, 240, marks=pytest.mark.slow)])
def test_killed_at_random(tmp_path, encoder, kills, epochs):
    data = feature_file(tmp_path, sizes={"train": 400, "valid": 40, "test": 40})
    options = ["-m", "self_mm", "-d", "custom", "--label-range", "3", "--text-encoder", encoder, "--data", str(data)]
    settings = ["--set", "batch_size=4", "--set", f"early_stop={epochs}", "--epochs", str(epochs), "--device", "cpu"]
    command = [sys.executable, "-c", "from registry.cli import main; main()", "run", *options, *settings]

    def run_in(name: str) -> list[str]:
        return [*command, "--runs", str(tmp_path / name)]

    subprocess.run(run_in("whole"), check=True, capture_output=True)
    hits = kill_at_random(run_in("killed"), kills, random.Random(0), longest=2.0)
    last = subprocess.run(run_in("killed"), check=True, capture_output=True, text=True)
    folders = {name: next((tmp_path / name).rglob("metrics.json")).parent for name in ("whole", "killed")}
    for name in ("predictions.csv", "labels.csv", "metrics.json"):
        assert (folders["killed"] / name).read_bytes() == (folders["whole"] / name).read_bytes()
    whole, killed = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    print(f"{hits} of {kills} kills hit; then: {last.stderr.splitlines()[-5:]}")
    assert hits >= kills // 2
    assert os.listdir(folders["killed"].parent) == ["1111"]
