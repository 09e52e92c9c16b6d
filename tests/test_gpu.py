"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import registry
from registry.contract import Batch, ModelSpec
from registry.data.batches import predict
from registry.data.text import TextEncoder
from registry.jobs import needs_of
from registry.plugins import Plugins
from registry.training import Epoch, Watcher
from selfmm_plugin import UnimodalLabelGenerator, UnimodalSupervision
from selfmm_plugin.upstream import translate
from tests.baselines import batch, configured, info
from tests.helpers import TINY_BERT, feature_file
from tests.test_golden import TRACES, Trace

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class LastEpoch(Watcher):
    """Compares weights and predictions after the last epoch with the trace's."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.compared = trace, False

    def epoch(self, record: Epoch) -> None:
        if record.epoch == self.trace.meta["epochs"]:
            expected = translate(self.trace.weights(f"epoch{record.epoch}/params/")).network
            for weight, values in self.model.state_dict().items():
                np.testing.assert_allclose(values.cpu(), expected[weight], atol=1e-4, err_msg=weight)
            found = predict(self.model, self.trace.split(train=False, device=CUDA)).cpu()
            np.testing.assert_allclose(found, self.trace.arrays["final_eval/M"], atol=1e-4)
            self.compared = True


@pytest.mark.parametrize("name", TRACES)
def test_training_follows_the_trace_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as `registry.run` trains
    trace = Trace(name)
    watcher = LastEpoch(trace)
    trace.train(monkeypatch, watcher, per_sample=True, device=CUDA)
    assert watcher.compared


def test_a_loss_that_is_not_observed_does_not_shift_the_others():
    """Comparing rows would wait for the device; each batch is stored in the rows that its loss had."""
    labels = torch.linspace(-3, 3, 64, device="cuda")
    supervision = UnimodalSupervision(labels, {"fusion": 1, "text": 1}, label_range=3.0, head_dims=1).cuda()
    rows = torch.arange(64, device="cuda")
    supervision.loss({"fusion": rows[:16, None] + 0.0, "text": rows[:16, None] + 0.0}, rows[:16])
    for index in rows.split(16):
        supervision.loss({"fusion": index[:, None] + 0.0, "text": index[:, None] + 0.0}, index)
        supervision.observe(index, 1)
    stored = supervision.generator.memory["fusion"].features[:48, 0]
    assert torch.equal(stored, rows[:48] + 0.0)


def test_autocast_does_not_lower_the_precision_of_the_centres_with_rows_on_the_host():
    labels = torch.tensor([1.0, -1.0], device="cuda").repeat(128_000)
    generator = UnimodalLabelGenerator(labels, {"fusion": 1, "text": 1}, label_range=3.0).cuda()
    features = {name: torch.full((len(labels), 1), 2.0, device="cuda") for name in ("fusion", "text")}
    with torch.autocast("cuda", dtype=torch.float16):
        generator.update(features, torch.arange(len(labels)), 1)
    assert [float(center) for center in generator.centers["text"]] == [2.0, 2.0]


@pytest.mark.parametrize("relative", ["positive", "centers", "difference"])
@pytest.mark.parametrize("centers", ["step", "epoch", "ema"])
def test_ulgm_never_waits_for_the_device(centers, relative):
    labels = torch.linspace(-3, 3, 64, device="cuda")
    widths = {"fusion": 8, "text": 6, "audio": 5}
    supervision = UnimodalSupervision(labels, widths, label_range=3.0, centers=centers, relative=relative).cuda()
    features = {
        name: torch.randn(16, width, device="cuda") for name, width in (("fusion", 8), ("text", 6), ("audio", 5))
    }
    index, mask = torch.arange(16, device="cuda"), {"audio": torch.rand(16, device="cuda") > 0.5}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in (1, 2, 3):
            supervision.loss(features, index, mask).backward()
            supervision.observe(index, epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert supervision.generator.labels["text"].isfinite().all()
    assert not supervision.generator.labels["text"][:16].equal(labels[:16])


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model in training mode whose step has no random draws, which differ between devices."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.train()


def same_draws(like: torch.Tensor) -> torch.Tensor:
    """Return what stands in for random numbers, which differ between devices."""
    return torch.linspace(-1, 1, like.numel(), device=like.device).view_as(like)


def moved(data: Batch, device: torch.device) -> Batch:
    arrays = {name: value.to(device) for name, value in vars(data).items() if isinstance(value, torch.Tensor)}
    return replace(data, **arrays, labels={task: values.to(device) for task, values in data.labels.items()})


def step_of(model: torch.nn.Module, data: Batch) -> dict[str, torch.Tensor]:
    """Return what a training step computes, before the update."""
    output = model(data)
    losses = {f"loss {name}": loss for name, loss in output.losses.items()}
    ((output.prediction - data.labels["M"]).square().mean() + sum(losses.values())).backward()
    features = {f"feature {name}": feature for name, feature in output.features.items()}
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"prediction": output.prediction, **features, **losses, **gradients}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("name", [entry.name for entry in Plugins().entries("model")])
def test_a_step_of_every_model_is_the_cpu_s(name, monkeypatch):
    """Predictions, features, losses and gradients, those of the bridge's models after their clipping to a norm."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "randn_like", same_draws)
    spec = Plugins().load("model", name)
    assert isinstance(spec, ModelSpec)
    still = TextEncoder.from_config({**TINY_BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    published = next(iter(spec.presets.values()), {})
    config = configured(spec, dataset="mosi" if "mosi" in published or not published else "sims")
    data = batch(tasks="MTAV", clips=16)
    if "text" not in needs_of(spec, config):
        data = replace(data, text_ids=None, text_mask=None, text_segments=None)
    on_cpu = without_dropout(spec.build(config, replace(info(tasks="MTAV"), text_encoder=still)))
    on_gpu = copy.deepcopy(on_cpu).to(CUDA)
    torch.manual_seed(0)
    expected = step_of(on_cpu, data)
    torch.manual_seed(0)
    found = step_of(on_gpu, moved(data, CUDA))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        atol = 1e-4 * max(1.0, float(values.abs().max()))
        np.testing.assert_allclose(found[key], values, rtol=1e-3, atol=atol, err_msg=key)


def test_a_run_on_a_gpu_is_loaded_on_the_cpu(tmp_path, encoder):
    state = torch.cuda.get_rng_state()
    result = registry.run(
        "self_mm",
        "custom",
        data=feature_file(tmp_path),
        text_encoder=encoder,
        label_range=3.0,
        runs=tmp_path / "runs",
        config={"epochs": 2},
        device="cuda",
    )
    run = registry.load_run(result.runs[0].folder)
    assert {parameter.device.type for parameter in run.model.parameters()} == {"cpu"}
    assert run.predictions["prediction"].notna().all()
    assert torch.equal(torch.cuda.get_rng_state(), state)
