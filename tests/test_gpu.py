"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import registry
from registry.data.batches import predict
from registry.training import Epoch, Watcher
from selfmm_plugin import UnimodalLabelGenerator, UnimodalSupervision
from selfmm_plugin.upstream import translate
from tests.helpers import feature_file
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


def test_ulgm_never_waits_for_the_device():
    labels = torch.linspace(-3, 3, 64, device="cuda")
    supervision = UnimodalSupervision(labels, {"fusion": 8, "text": 6, "audio": 5}, label_range=3.0).cuda()
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
