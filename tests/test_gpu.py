"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import registry
from registry import benchmark, graphs
from registry.contract import Batch, ModelSpec
from registry.data import batches
from registry.data.batches import Split, predict
from registry.data.feature_file import read_feature_file
from registry.data.text import TextEncoder
from registry.data.text_model import SPARE, TextModel, _Packing, set_precision
from registry.errors import RunFailed
from registry.graphs import Recorder
from registry.jobs import needs_of
from registry.plugins import Plugins
from registry.training import Epoch, Watcher
from registry.unfinished import Unfinished
from selfmm_plugin import UnimodalLabelGenerator, UnimodalSupervision
from selfmm_plugin.upstream import translate
from tests.baselines import batch, configured, info
from tests.helpers import TINY_BERT, feature_file, tiny_encoder
from tests.test_golden import TRACES, Trace
from tests.test_text_model import slopes_with_dropout, under_autocast_near_without

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
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as `--precision fp32` trains
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


STILL = {"hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Still:
    """Everything that draws random numbers on the device stands still, so that runs can be compared."""

    def __init__(self, monkeypatch, tmp_path) -> None:
        monkeypatch.setattr(torch.nn.functional, "dropout", lambda values, *_, **__: values)
        monkeypatch.setattr(torch, "randn_like", same_draws)
        monkeypatch.setattr(benchmark, "set_precision", lambda model, name: set_precision(without_dropout(model), name))
        self.tmp_path = tmp_path
        self.encoder = str(tiny_encoder(tmp_path / "still", **STILL))
        sizes = {"train": 70, "valid": 12, "test": 12}
        keys = [f"regression_labels_{task}" for task in "TAV"]
        own = {split: {key: np.linspace(-2, 2, n, dtype=np.float32) for key in keys} for split, n in sizes.items()}
        self.data = feature_file(tmp_path, sizes=sizes, **own)

    def run(self, model: str, runs: str, **options) -> registry.Result:
        config = {"epochs": 3, "batch_size": 8, **options.pop("config", {})}
        return registry.run(
            model,
            "custom",
            data=self.data,
            text_encoder=self.encoder,
            label_range=3.0,
            runs=self.tmp_path / runs,
            config=config,
            device="cuda",
            **options,
        )


@pytest.fixture
def still(monkeypatch, tmp_path) -> Still:
    return Still(monkeypatch, tmp_path)


def weights_of(result: registry.Result) -> dict[str, np.ndarray]:
    run = registry.load_run(result.runs[0].folder)
    return {name: values.cpu().numpy() for name, values in run.model.state_dict().items()}


def log_of(result: registry.Result) -> str:
    return (result.runs[0].folder / "log.txt").read_text()


@pytest.mark.parametrize("batch_size", [8, 20])
@pytest.mark.parametrize("hook", ["", "hook.centers=epoch", "hook.distance=cosine", "supervision=multimodal"])
def test_recorded_steps_give_what_usual_ones_give(still, hook, batch_size):
    """Weights, predictions and generated labels after three epochs, the tail's steps included."""
    changed = dict([hook.split("=")]) if hook else {}
    config = {"update_epochs": 2, "batch_size": batch_size, **changed}
    recorded = still.run("self_mm", "recorded", precision="fp32", config=config)
    usual = still.run("self_mm", "usual", precision="fp32", config=config, graph=False)
    assert "steps were replayed" in log_of(recorded)
    assert "replayed" not in log_of(usual)
    expected = weights_of(usual)
    for name, values in weights_of(recorded).items():
        np.testing.assert_allclose(values, expected[name], atol=2e-5, err_msg=name)
    one, other = (registry.load_run(result.runs[0].folder) for result in (recorded, usual))
    columns = ["text", "audio", "vision"]
    # Features without dropout are nearly parallel: what is left of 1 - cosine is rounding, and is divided by.
    atol = 0.1 if "cosine" in hook else 2e-3
    np.testing.assert_allclose(one.table("labels")[columns], other.table("labels")[columns], atol=atol)
    np.testing.assert_allclose(one.predictions["prediction"], other.predictions["prediction"], atol=1e-4)


def test_recorded_steps_follow_a_rate_that_is_lowered(still):
    config = {"update_epochs": 1, "epochs": 6, "scheduler": "plateau", "scheduler_patience": 0}
    recorded, usual = (still.run("self_mm", r, precision="fp32", config=config, graph=r == "a") for r in ("a", "b"))
    expected = weights_of(usual)
    for name, values in weights_of(recorded).items():
        np.testing.assert_allclose(values, expected[name], atol=5e-5, err_msg=name)


def test_recorded_steps_in_bf16_are_near_usual_ones(still):
    recorded, usual = (still.run("self_mm", r, precision="bf16", graph=r == "a") for r in ("a", "b"))
    assert "steps were replayed" in log_of(recorded)
    expected = weights_of(usual)
    for name, values in weights_of(recorded).items():
        np.testing.assert_allclose(values, expected[name], atol=2e-2, err_msg=name)


@pytest.mark.parametrize("name", [entry.name for entry in Plugins().entries("model")])
def test_every_model_trains_recorded_or_not_to_the_same(still, name):
    recorded, usual = (still.run(name, runs, precision="fp32", graph=runs == "a") for runs in ("a", "b"))
    assert [run.reason for run in (*recorded.runs, *usual.runs)] == [None, None]
    print(name, log_of(recorded).splitlines()[-1])  # with -s: which models are recorded
    # Attention does not depend on its keys' biases, whose gradients are rounding, and Adam makes steps of them that are
    # as long as any; what upstream calls a float tensor has never been set.
    expected = weights_of(usual)
    for weight, values in weights_of(recorded).items():
        if not weight.endswith(("inputs.bias", "in_proj_bias", "_float_tensor")):
            np.testing.assert_allclose(values, expected[weight], atol=2e-4, err_msg=weight)
    one, other = (registry.load_run(result.runs[0].folder) for result in (recorded, usual))
    np.testing.assert_allclose(one.history["train_loss"], other.history["train_loss"], rtol=1e-4)
    np.testing.assert_allclose(one.predictions["prediction"], other.predictions["prediction"], atol=5e-4)


class NeverWaits(Watcher):
    """Makes every wait for the device an error from one step to the next, within an epoch."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, epoch: int, step: int, steps: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if epoch > 1 and step < steps else "default")
        self.steps += epoch > 1


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_training_step_never_waits_for_the_device(still, precision, graph):
    watcher = NeverWaits()
    try:
        result = still.run("self_mm", "runs", precision=precision, graph=graph, watcher=watcher)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.runs[0].status == "ok", result.runs[0].reason
    assert watcher.steps > 2


def recorder_of(*modules: torch.nn.Module) -> Recorder:
    return Recorder(modules, [], lambda: None)


def clips(n: int = 4) -> Batch:
    return Batch(index=torch.arange(n, device=CUDA))


def test_dropout_is_drawn_anew_in_every_replay():
    recorder, layer = recorder_of(), torch.nn.Dropout(0.5)
    found = [recorder(lambda batch: layer(torch.ones(1000, device=CUDA)).clone(), clips(), 0).clone() for _ in range(6)]
    assert recorder.replayed == 4
    assert len({tuple(values.tolist()) for values in found}) == 6


def test_replays_read_the_batch_they_are_given():
    recorder = recorder_of()
    batches = [Batch(index=torch.full((3,), n, device=CUDA)) for n in range(5)]
    found = [int(recorder(lambda batch: batch.index.sum(), batch, 0)) for batch in batches]
    assert (found, recorder.replayed) == ([0, 3, 6, 9, 12], 3)
    assert int(recorder(lambda batch: batch.index.sum(), clips(7), 0)) == 21


def test_more_shapes_than_are_kept_are_recorded_anew(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    recorder, weight = recorder_of(), torch.randn(512, 512, device=CUDA)

    def step(batch: Batch) -> torch.Tensor:
        return (weight[batch.index] @ weight).sum()

    for n in [4, 4, 4, 5, 5, 6, 6, 4, 5, 6, 4, 4]:
        torch.testing.assert_close(recorder(step, clips(n), 0), step(clips(n)))
    assert recorder.replayed > 6


class Anneals(torch.nn.Module):
    """Its factor is another in every epoch."""

    factor = 1.0

    def forward(self, batch: Batch) -> torch.Tensor:
        return batch.index.sum() * self.factor


def test_what_changes_between_epochs_is_recorded_anew():
    model = Anneals()
    recorder, found = recorder_of(model), []
    for epoch in range(3):
        model.factor = float(epoch)
        recorder.begin_epoch()
        found += [float(recorder(model, clips(4), 0)) for _ in range(4)]
    assert found == [0.0] * 4 + [6.0] * 4 + [12.0] * 4
    assert recorder.replayed > 2


class HalfWay(torch.nn.Module):
    """A step that fails while it is recorded, on a branch, and leaves a clip in its queue."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.waiting: list[int] = []

    def forward(self, batch: Batch) -> torch.Tensor:
        self.waiting.append(1)
        if torch.cuda.is_current_stream_capturing():
            branch = torch.cuda.Stream()
            branch.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(branch):
                batch.index + 1
                raise self.error
        self.waiting.pop()
        return batch.index.sum()


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (RuntimeError("no"), RunFailed, "half way"),
        (torch.OutOfMemoryError("no"), torch.OutOfMemoryError, "recording one failed"),
    ],
)
def test_a_recording_that_leaves_a_hook_half_way_ends_the_training(error, raised, said):
    queue = HalfWay(error)
    recorder = recorder_of(queue)
    for _ in range(2):
        recorder(queue, clips(), 0)
    with pytest.raises(raised, match=said):
        recorder(queue, clips(), 0)


class Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(gradient.sum())


def waits_in_forward(batch: Batch) -> torch.Tensor:
    return batch.index * float(batch.index.sum())


def waits_in_backward(batch: Batch) -> torch.Tensor:
    values = torch.ones(3, device=CUDA, requires_grad=True)
    Waits.apply(values).sum().backward()
    return values.grad * batch.index.sum()


@pytest.mark.parametrize("step", [waits_in_forward, waits_in_backward])
@pytest.mark.parametrize("seen", [True, False])
def test_a_step_that_waits_for_the_device_runs_as_usual(step, seen, monkeypatch):
    """Also where it was not seen to wait, so that recording it fails: dropout must go on then."""
    if not seen:
        monkeypatch.setattr(Recorder, "_watched", lambda self: contextlib.nullcontext())
    recorder = recorder_of()
    expected = step(clips())
    for _ in range(5):
        assert torch.equal(recorder(step, clips(), 0), expected)
    assert recorder.replayed == 0
    assert "were not recorded" in str(recorder)
    assert 0 < float(torch.nn.functional.dropout(torch.ones(1000, device=CUDA)).mean()) < 2
    fresh = recorder_of()
    for _ in range(4):
        fresh(lambda batch: torch.rand(3, device=CUDA), clips(), 0)
    assert fresh.replayed == 2


def test_a_hook_that_promises_nothing_gets_plain_numbers(still, tmp_path):
    file = tmp_path / "counting.py"
    file.write_text(COUNTING)
    result = still.run("self_mm", "runs", plugins=[str(file)], hooks=["counting"])
    assert "the hook counting does not promise" in log_of(result)
    assert registry.load_run(result.runs[0].folder).table("epochs")["seen"].tolist() == [1, 2, 3]


COUNTING = """
from registry import HookSpec, TrainingHook

class Counting(TrainingHook):
    def __init__(self):
        super().__init__()
        self.seen = set()
    def observe(self, output, batch, epoch):
        assert isinstance(epoch, int)
        self.seen.add(epoch)
    def artifacts(self):
        return {"epochs": {"seen": sorted(self.seen)}}

SPEC = HookSpec(name="counting", summary="counts", build=lambda config, train, feature_dims: Counting())
"""


@pytest.mark.parametrize("needs", [("audio", "vision"), ("audio", "vision", "padding")])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_batch_on_a_gpu_is_the_cpu_s(needs, share, tmp_path, monkeypatch):
    """Also of clips that lie there without their padding."""
    monkeypatch.setattr(batches, "SHARE_OF_MEMORY", share)
    file = feature_file(tmp_path, sizes={"train": 20, "valid": 4, "test": 4})
    arrays = read_feature_file(file, label_range=3.0).splits["train"]
    one, other = (Split(arrays, arrays.text_bert, torch.device(d), train=True, needs=needs) for d in ("cpu", "cuda"))
    rows = torch.tensor([7, 2, 11])
    for rounded in (True, False):
        sizes = one.sizes(rows, rounded=rounded)
        expected, found = (split.batch(rows, sizes).tensors() for split in (one, other))
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values.is_cuda
            assert torch.equal(values.cpu(), expected[name]), name


def test_what_does_not_fit_stays_on_the_host_and_gives_the_same(still, monkeypatch):
    config = {"batch_size": 8}
    on_device = still.run("self_mm", "device", precision="fp32", config=config)
    monkeypatch.setattr(batches, "SHARE_OF_MEMORY", 0.0)
    on_host = still.run("self_mm", "host", precision="fp32", config=config)
    expected = weights_of(on_device)
    for name, values in weights_of(on_host).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("clips", [2, 16, 64])
def test_packed_attention_is_that_of_padded_clips(dtype, width, clips):
    """Also of fewer tokens than may be spare, and of narrow heads."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**TINY_BERT, "hidden_size": width})
    model = TextModel(transformers.BertModel(config)).eval().cuda()
    model.dtype = dtype
    mask = (torch.arange(20) < torch.randint(2, 20, (clips, 1))).long().cuda()
    ids = torch.randint(1, 50, mask.shape, device=CUDA) * mask
    real = int(mask.sum())
    expected = model(ids, mask, torch.zeros_like(ids))
    for rows in (real + 1, min(real + SPARE, mask.numel())):
        places = (mask == 0).flatten().sort(stable=True).indices[:rows]
        found = model(ids, mask, torch.zeros_like(ids), places)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=tolerance, rtol=0)


def test_packed_tokens_under_autocast_are_near_those_without():
    under_autocast_near_without("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_dropout_of_packed_attention(dtype):
    """Gradients are those of padded clips; with dropout the mean over draws is what it is without."""
    torch.manual_seed(0)
    mask = (torch.arange(20) < torch.randint(2, 20, (16, 1))).long().cuda()
    places = (mask == 0).flatten().sort(stable=True).indices[: int(mask.sum()) + 50]
    packing = _Packing(mask, places)
    heads = torch.randn(len(places), 3, 2, 16, device=CUDA, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(places), 2, 16, device=CUDA, dtype=dtype) * (mask.flatten()[places] == 1)[:, None, None]
    attended = packing.attend(heads, 0.0)
    (found,) = torch.autograd.grad((attended * weights).sum(), heads)
    slow = [packing.spread(tensor).transpose(1, 2) for tensor in heads.unbind(1)]
    padded = torch.nn.functional.scaled_dot_product_attention(*slow, attn_mask=mask.bool()[:, None, None])
    padded = padded.transpose(1, 2).flatten(0, 1).index_select(0, places)
    (expected,) = torch.autograd.grad((padded * weights).sum(), heads)
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-3 if dtype == torch.float32 else 0.1, rtol=0.02)
    with torch.no_grad():
        draws = torch.stack([packing.attend(heads, 0.5) for _ in range(2000)]).float()
    real = mask.flatten()[places] == 1
    assert (draws.mean(0) - attended.float())[real].abs().mean() < 0.05
    assert draws.std(0)[real].mean() > 0.1
    if dtype == torch.float32:
        by_gradient, by_values = slopes_with_dropout(heads.detach().clone(), packing)
        assert by_gradient == pytest.approx(by_values, rel=0.01, abs=0.1)


class InterruptedIn(Watcher):
    """Interrupts the first step of an epoch; its trainings are kept at every epoch's end."""

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def note(self, text: str) -> None:
        pass

    def step(self, epoch: int, step: int, steps: int) -> None:
        if epoch == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", [entry.name for entry in Plugins().entries("model") if "mmsa_" not in entry.name])
def test_deterministic_runs_are_equal_to_the_last_bit_also_when_interrupted(name, still, monkeypatch):
    monkeypatch.undo()  # dropout too
    monkeypatch.setattr(Unfinished, "due", lambda self, parts: not self.fault)

    def content(runs: str, **options) -> dict[str, bytes]:
        result = still.run(name, runs, deterministic=True, **options)
        assert result.runs[0].reason is None
        return {file: (result.runs[0].folder / file).read_bytes() for file in ("predictions.csv", "model.safetensors")}

    first = content("first")
    assert content("second") == first
    if name == "ef_lstm":
        return  # dropout between the layers of an LSTM has a state in cuDNN that nobody can read
    with pytest.raises(KeyboardInterrupt):
        content("third", watcher=InterruptedIn(3))
    assert content("third") == first


@pytest.mark.parametrize("model", ["self_mm", "lf_dnn+heads"])
def test_a_run_predicts_the_same_on_either_device(tmp_path, model):
    encoder, data = str(tiny_encoder(tmp_path / "encoder")), feature_file(tmp_path)
    config = {"epochs": 2, "batch_size": 4, "standardize": True}
    options = {"text_encoder": encoder, "label_range": 3.0, "runs": tmp_path / "runs", "precision": "fp32"}
    run = registry.load_run(
        registry.run(model, "custom", data=data, config=config, device="cuda", **options).runs[0].folder
    )
    on_cpu, on_gpu = (registry.predict(run, data, split="test", device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu["prediction"], run.predictions["prediction"], atol=1e-5)
    for name in ("prediction", "text", "audio", "vision"):
        np.testing.assert_allclose(on_cpu[name], on_gpu[name], atol=1e-4)
