"""Upstream's trainer, written down step by step, against ours (tests/golden/, made with MMSA's SELF_MM)."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from registry import Batch, DataInfo, FusionOutput, TextEncoder, Training, TrainingData, TrainingHook
from registry.data.batches import Group, Split, forward
from registry.data.splits import SplitArrays
from registry.data.text_model import _by_length
from registry.training import Epoch, Watcher, _Step, make_optimizer, train
from selfmm_plugin.network import SelfMM, SelfMMConfig
from selfmm_plugin.supervision import UlgmConfig, UlgmHook
from selfmm_plugin.ulgm import UnimodalLabelGenerator
from selfmm_plugin.upstream import network_from_state, translate

FOLDER = Path(__file__).parent / "golden"
TRACES = ["selfmm_unaligned", "selfmm_zero_counts_positive", "selfmm_dropped_tail"]
CPU = torch.device("cpu")
TASKS = ("fusion", "text", "audio", "vision")
KEYS = [
    *(f"learning_rate_{part}" for part in ("bert", "audio", "video", "other")),
    *(f"weight_decay_{part}" for part in ("bert", "audio", "video", "other")),
    *(f"post_{part}_dim" for part in ("fusion", "text", "audio", "video")),
    *(f"post_{part}_dropout" for part in ("fusion", "text", "audio", "video")),
    *("a_lstm_hidden_size", "v_lstm_hidden_size", "audio_out", "video_out", "H", "excludeZero"),
]


class ModelConfig(SelfMMConfig, Training):
    """Self-MM's keys and the training loop's, as the registry joins them."""


class Trace:
    """A golden file with what it takes to run it."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(FOLDER / f"{name}.npz")
        self.meta = json.loads(bytes(self.arrays["meta"]))
        self.text_config = json.loads(bytes(self.arrays["bert_config"]))
        self.labels = torch.from_numpy(self.arrays["labels"])

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in self.arrays.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): torch.from_numpy(self.arrays[name]) for name in names}

    def config(self) -> ModelConfig:
        training = {key: self.meta[key] for key in ("batch_size", "update_epochs")}
        return ModelConfig(tail="drop", **training, **{key: self.meta[key] for key in KEYS})

    def split(self, *, train: bool, device: torch.device = CPU) -> Split:
        arrays = SplitArrays(
            ids=[str(i) for i in range(len(self.labels))],
            labels={"M": self.arrays["labels"]},
            audio=self.arrays["audio"],
            audio_lengths=self.arrays["audio_lengths"],
            vision=self.arrays["vision"],
            vision_lengths=self.arrays["vision_lengths"],
        )
        return Split(arrays, self.arrays["text_bert"].astype(np.int64), device, train=train)

    def build(self) -> tuple[SelfMM, UlgmHook, ModelConfig]:
        config, start = self.config(), translate(self.weights("init/"))
        encoder = TextEncoder.from_config(self.text_config)
        data = DataInfo(
            name="trace",
            dims=start.dims,
            max_lengths={},
            n_train=len(self.labels),
            label_range=self.meta["H"],
            tasks=("M",),
            aligned=False,
            text_encoder=encoder,
        )
        model = SelfMM(config, data)
        model.load_state_dict(start.network)
        hook = UlgmHook(UlgmConfig(**config.hook_values()), TrainingData({"M": self.labels}, data), model.feature_dims)
        hook.supervision.heads.load_state_dict(start.heads)
        return model, hook, config

    def train(
        self, monkeypatch: pytest.MonkeyPatch, watcher: Watcher, *, per_sample: bool, device: torch.device = CPU
    ) -> None:
        """Train with the registry's loop, in the trace's order; `watcher` gets the model and the hook beforehand."""
        model, ulgm, config = self.build()
        watcher.model, watcher.ulgm = model.to(device), ulgm.to(device)  # type: ignore[attr-defined]
        orders = iter(torch.from_numpy(self.arrays["order"]).long())
        monkeypatch.setattr(torch, "randperm", lambda n, generator: next(orders))
        hooks = {"ulgm": ulgm, "recorder": Recorder(self, ulgm)} if device == CPU else {"ulgm": ulgm}
        splits = {name: self.split(train=name == "train", device=device) for name in ("train", "valid")}
        options = {"per_sample": per_sample, "generator": torch.Generator(), "watcher": watcher}
        train(
            model, hooks, config.model_copy(update={"epochs": self.meta["epochs"], "early_stop": 99}), splits, **options
        )
        if device == CPU:
            recorder = hooks["recorder"]
            assert recorder.step == recorder.losses == len(self.arrays["loss_MTAV"])


class Recorder(TrainingHook):
    """Compares every micro-batch with the trace; it comes after ULGM, and adds no loss."""

    def __init__(self, trace: Trace, ulgm: UlgmHook) -> None:
        super().__init__()
        self.trace, self.ulgm, self.step, self.losses = trace, [ulgm], 0, 0

    def loss(self, output: FusionOutput, batch: Batch) -> torch.Tensor:
        supervision = self.ulgm[0].supervision
        weights, labels = supervision.generator.weights(batch.index), supervision.generator.labels
        predictions = {"fusion": output.prediction, **supervision.predict(output.features)}
        expected = self.trace.arrays[f"step{self.losses:03}/pred_MTAV"]
        for row, task in enumerate(TASKS):
            prediction = predictions[task].detach()
            np.testing.assert_allclose(prediction, expected[row], atol=1e-5)
            weight = 1.0 if task == "fusion" else weights[task]
            loss = (weight * (prediction - labels[task][batch.index]).abs()).mean()
            assert float(loss) == pytest.approx(self.trace.arrays["loss_MTAV"][self.losses, row], abs=2e-5)
        self.losses += 1
        return super().loss(output, batch)

    def observe(self, output: FusionOutput, batch: Batch, epoch: int) -> None:
        generator = self.ulgm[0].supervision.generator
        step = f"step{self.step:03}"
        for task in TASKS:
            stored = generator.memory[task].features[batch.index]
            np.testing.assert_allclose(stored, self.trace.arrays[f"{step}/feature/{task}"], atol=1e-5)
            np.testing.assert_allclose(generator.labels[task], self.trace.arrays[f"{step}/labels/{task}"], atol=2e-4)
            for center, sign in zip(generator.centers[task], ("pos", "neg"), strict=True):
                np.testing.assert_allclose(center, self.trace.arrays[f"{step}/center/{task}/{sign}"], atol=1e-5)
        self.step += 1


class Follower(Watcher):
    """Compares the weights after every epoch with the trace's, and the predictions after the last."""

    model: SelfMM
    ulgm: UlgmHook

    def __init__(self, trace: Trace) -> None:
        self.trace, self.epochs = trace, 0

    def epoch(self, record: Epoch) -> None:
        self.epochs += 1
        expected = translate(self.trace.weights(f"epoch{record.epoch}/params/"))
        for state, wanted in (
            (self.model.state_dict(), expected.network),
            (self.ulgm.supervision.heads.state_dict(), expected.heads),
        ):
            assert state.keys() == wanted.keys()
            for name in state:
                np.testing.assert_allclose(state[name], wanted[name], atol=1e-5, err_msg=f"{record.epoch} {name}")
        if record.epoch == self.trace.meta["epochs"]:
            self.predict()

    @torch.no_grad()
    def predict(self) -> None:
        self.ulgm.eval()
        clips = torch.arange(len(self.trace.labels))
        output = forward(self.model, self.trace.split(train=False), clips, chunk=7)
        predictions = {"M": output.prediction, **self.ulgm.supervision.predict(output.features)}
        for task, name in zip("MTAV", ("M", "text", "audio", "vision"), strict=True):
            np.testing.assert_allclose(predictions[name], self.trace.arrays[f"final_eval/{task}"], atol=1e-5)


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("per_sample", [True, False], ids=["whole groups", "micro-batches"])
def test_training_follows_the_trace(name: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(name)
    follower = Follower(trace)
    trace.train(monkeypatch, follower, per_sample=per_sample)
    assert follower.epochs == trace.meta["epochs"]


@pytest.mark.parametrize("name", TRACES)
def test_generator_fed_with_the_trace_s_features(name: str) -> None:
    trace = Trace(name)
    dims = {task: trace.arrays[f"step000/feature/{task}"].shape[1] for task in TASKS}
    generator = UnimodalLabelGenerator(trace.labels, dims, trace.meta["H"], exclude_zero=trace.meta["excludeZero"])
    step = 0
    for epoch, order in enumerate(trace.arrays["order"], 1):
        for index in torch.from_numpy(order).long().split(trace.meta["batch_size"]):
            features = {t: torch.from_numpy(trace.arrays[f"step{step:03}/feature/{t}"]) for t in TASKS}
            generator.update(features, index, epoch)
            for task in TASKS:
                expected = trace.arrays[f"step{step:03}/labels/{task}"]
                np.testing.assert_allclose(generator.labels[task], expected, atol=5e-5)
            step += 1


@pytest.mark.parametrize("name", TRACES)
def test_network_from_upstream_weights_predicts_as_upstream(name: str) -> None:
    trace = Trace(name)
    state = trace.weights(f"epoch{trace.meta['epochs']}/params/")
    for prefix in ("", "Model."):
        network = network_from_state({prefix + key: value for key, value in state.items()}, trace.text_config).eval()
        with torch.no_grad():
            output = network(trace.split(train=False).batch(torch.arange(len(trace.labels))))
        np.testing.assert_allclose(output.prediction, trace.arrays["final_eval/M"], atol=1e-5)


class AsksForValues(TorchDispatchMode):
    """Writes down what would make a GPU wait: a tensor's value is read, or a shape depends on values.

    What only a CPU does, ordering clips by length for attention, may ask.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES and not any(
            frame.name == _by_length.__name__ for frame in traceback.extract_stack()
        ):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("epoch", [2, torch.tensor(2)], ids=["number", "tensor"])
def test_a_training_step_asks_no_tensor_for_its_value(per_sample, epoch):
    """A GPU's own word on it is in test_gpu.py."""
    trace = Trace(TRACES[0])
    model, ulgm, config = trace.build()
    step = _Step(model, [ulgm], config, trace.split(train=True), make_optimizer(model, [ulgm], config), per_sample)
    group = Group(torch.arange(3 * config.batch_size).split(config.batch_size), step=True)
    step(group, 1)
    with AsksForValues() as asks:
        step(group, epoch)
        assert asks.asked == []
        assert bool(torch.ones(()))
    assert asks.asked == ["aten._local_scalar_dense.default"]
