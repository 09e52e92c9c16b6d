"""The training loop: groups, clipping, early stopping, best weights, hooks, failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from registry import FusionOutput, Rates, RunFailed, TextEncoder, Training, TrainingHook
from registry.data.batches import Split
from registry.data.splits import SplitArrays
from registry.training import Epoch, Watcher, make_optimizer, text_sums, train
from tests.helpers import TINY_BERT

CPU = torch.device("cpu")
DIRECTION = np.array([1.0, -2.0, 0.5], dtype=np.float32)


def make_splits(n: int = 24, valid: int = 8) -> dict[str, Split]:
    """Clips whose label is a linear function of their only audio step."""
    rng = np.random.default_rng(0)

    def make(name: str, clips: int) -> Split:
        audio = rng.normal(size=(clips, 1, 3)).astype(np.float32)
        ids, lengths = [f"{name}{i}" for i in range(clips)], np.ones(clips, dtype=np.int64)
        arrays = SplitArrays(ids, {"M": audio[:, 0] @ DIRECTION}, audio=audio, audio_lengths=lengths)
        return Split(arrays, None, CPU, train=name == "train")

    return {"train": make("train", n), "valid": make("valid", valid)}


class Linear(nn.Module):
    """A linear model of the first audio step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.feature_dims = {"audio": 3}

    def forward(self, batch) -> FusionOutput:
        return FusionOutput(self.linear(batch.audio[:, 0]).squeeze(-1), features={"audio": batch.audio[:, 0]})


class Scripted(Linear):
    """Its validation MAE is given, epoch by epoch."""

    def __init__(self, splits, errors: list[float]) -> None:
        super().__init__()
        self.truth, self.errors, self.evaluations = splits["valid"].labels["M"], errors, 0

    def forward(self, batch) -> FusionOutput:
        if self.training:
            return super().forward(batch)
        self.evaluations += 1
        return FusionOutput(self.truth[split_order(self.truth, batch)] + self.errors[self.evaluations - 1])


def split_order(truth, batch) -> torch.Tensor:
    """Which validation clips a batch holds; the labels are withheld, so by the linear rule."""
    values = batch.audio[:, 0] @ torch.from_numpy(DIRECTION)
    return (values[:, None] - truth).abs().argmin(dim=1)


class Config(Training):
    """What a model without its own rates gets."""

    learning_rate: float = 0.05
    weight_decay: float = 0.0


def fit(model, splits, hooks=None, *, per_sample=False, watcher=None, seed=0, **options):
    config = Config(**{"batch_size": 4, "update_epochs": 2, "epochs": 3, **options})
    generator = torch.Generator().manual_seed(seed)
    return train(model, hooks or {}, config, splits, per_sample=per_sample, generator=generator, watcher=watcher)


def fresh() -> Linear:
    torch.manual_seed(0)
    return Linear()


def test_it_learns():
    model = fresh()
    outcome = fit(model, make_splits(), epochs=100, early_stop=20)
    assert outcome.history[-1].train_loss < 0.3
    np.testing.assert_allclose(model.linear.weight[0].detach(), DIRECTION, atol=0.1)


def test_a_group_as_one_forward_gives_what_its_micro_batches_give():
    together, apart = fresh(), fresh()
    one, other = (fit(m, make_splits(22), per_sample=p) for m, p in ((together, True), (apart, False)))
    torch.testing.assert_close(together.linear.weight, apart.linear.weight, atol=1e-6, rtol=0)
    assert [e.train_loss for e in one.history] == pytest.approx([e.train_loss for e in other.history], abs=1e-6)


def test_gradients_are_summed_over_a_group_of_micro_batch_means():
    model, expected, splits = fresh(), fresh(), make_splits(8)
    fit(model, splits, epochs=1)
    optimizer = make_optimizer(expected, [], Config())
    for rows in torch.randperm(8, generator=torch.Generator().manual_seed(0)).split(4):
        batch = splits["train"].batch(rows)
        (expected(batch).prediction - batch.labels["M"]).abs().mean().backward()
    optimizer.step()
    torch.testing.assert_close(model.linear.weight, expected.linear.weight)


class WithLoss(Linear):
    """Adds a batch-level loss."""

    def forward(self, batch) -> FusionOutput:
        output = super().forward(batch)
        return FusionOutput(output.prediction, losses={"spread": output.prediction.std(correction=0)})


def test_a_models_own_losses_are_added_and_never_dropped():
    splits, options = make_splits(8), {"epochs": 1, "batch_size": 8, "update_epochs": 1}
    torch.manual_seed(0)
    model = WithLoss()
    spread = float(model(splits["train"].batch(torch.arange(8))).losses["spread"].detach())
    plain = fit(fresh(), splits, **options).history[0].train_loss
    assert fit(model, splits, **options).history[0].train_loss == pytest.approx(plain + spread, rel=1e-5)
    with pytest.raises(ValueError, match="per_sample=True returns batch-level losses"):
        fit(model, splits, per_sample=True, **options)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("mse", 2)])
def test_the_criterion(criterion, power):
    splits, model = make_splits(8), fresh()
    batch = splits["train"].batch(torch.arange(8))
    expected = (model(batch).prediction - batch.labels["M"]).detach().abs().pow(power).mean()
    outcome = fit(model, splits, criterion=criterion, batch_size=8, update_epochs=1, epochs=1)
    assert outcome.history[0].train_loss == pytest.approx(float(expected), rel=1e-5)


class CountSteps(Watcher):
    """Counts what a run says of itself."""

    def __init__(self) -> None:
        self.steps, self.epochs = [], []

    def step(self, epoch: int, step: int, steps: int) -> None:
        self.steps.append((epoch, step, steps))

    def epoch(self, record: Epoch) -> None:
        self.epochs.append(record)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_tail_is_stepped_or_only_looked_at(per_sample):
    """9 micro-batches of 1 in groups of 2: the last group has one."""
    weights = {}
    for tail in ("step", "drop"):
        model, seen = fresh(), []
        hook = Recorder(seen)
        fit(model, make_splits(9), {"seen": hook}, per_sample=per_sample, tail=tail, batch_size=1, epochs=1)
        weights[tail] = model.linear.weight.detach().clone()
        assert len(seen) == 9
    assert not torch.equal(weights["step"], weights["drop"])


def test_fewer_micro_batches_than_a_group_always_step():
    model, before = fresh(), fresh().linear.weight.detach().clone()
    fit(model, make_splits(3), tail="drop", update_epochs=9, epochs=1)
    assert not torch.equal(model.linear.weight, before)


@pytest.mark.parametrize("per_sample", [False, True])
def test_clipping_comes_after_each_micro_batch(monkeypatch, per_sample):
    """Upstream clips what is summed so far: the last clip is what counts, so no sum exceeds the bound."""
    clips = []
    clip = nn.utils.clip_grad_value_
    monkeypatch.setattr(nn.utils, "clip_grad_value_", lambda *a: (clips.append(1), clip(*a)))
    fit(fresh(), make_splits(24), clip_value=0.01, per_sample=per_sample, epochs=1)
    assert len(clips) == 6


def test_clipping_bounds_the_gradients(monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        seen.extend(float(p.grad.abs().max()) for g in self.param_groups for p in g["params"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    fit(fresh(), make_splits(), clip_value=0.01)
    assert max(seen) == pytest.approx(0.01)
    seen.clear()
    fit(fresh(), make_splits())
    assert max(seen) > 0.01


def test_early_stopping_keeps_the_best_epochs_weights():
    splits, watcher = make_splits(), CountSteps()
    model = Scripted(splits, [0.5, 0.3, 0.4, 0.3 - 1e-7, 0.35])
    hook = Epochs()
    outcome = fit(model, splits, {"epochs": hook}, epochs=None, early_stop=3, watcher=watcher)
    assert (outcome.best_epoch, len(outcome.history)) == (2, 5)
    assert [record.best for record in watcher.epochs] == [True, True, False, False, False]
    assert watcher.steps[:4] == [(1, 1, 3), (1, 2, 3), (1, 3, 3), (2, 1, 3)]
    assert float(hook.last) == 2  # the hook's state is that of the best epoch as well
    assert outcome.history[1].valid_mae == pytest.approx(0.3, abs=1e-5)


def test_the_weights_at_the_end_are_those_of_the_best_epoch():
    splits, snapshots = make_splits(), []

    class Snapshot(Watcher):
        def epoch(self, record: Epoch) -> None:
            snapshots.append(model.linear.weight.detach().clone())

    torch.manual_seed(0)
    model = Scripted(splits, [0.5, 0.3, 0.4, 0.6])
    fit(model, splits, epochs=4, watcher=Snapshot())
    assert torch.equal(model.linear.weight, snapshots[1])
    assert not torch.equal(model.linear.weight, snapshots[3])


def test_plateau_halves_the_learning_rate(monkeypatch):
    rates = []

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    splits = make_splits(8)
    errors = [0.1, *[0.2] * 5]
    fit(Scripted(splits, errors), splits, scheduler="plateau", early_stop=5, epochs=None)
    assert rates == [0.05] * 4 + [0.025] * 2  # patience is half of early_stop


@pytest.mark.parametrize("where", ["train", "valid"])
def test_numbers_that_are_not_finite_fail_the_run(where):
    splits = make_splits()
    if where == "train":
        splits["train"].labels["M"][3] = math.inf
        model = fresh()
    else:
        model = Scripted(splits, [0.5, math.nan])
    with pytest.raises(RunFailed, match=r"epoch [12] ended with train loss .* and validation MAE"):
        fit(model, splits)


class Recorder(TrainingHook):
    """Notes the rows it sees."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def observe(self, output, batch, epoch) -> None:
        self.seen.append((epoch, batch.index.tolist()))


class Epochs(TrainingHook):
    """A hook with a parameter and a buffer that holds the last epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("last", torch.zeros(()))

    def loss(self, output, batch) -> torch.Tensor:
        return self.weight * output.features["audio"].abs().mean()

    def end_epoch(self, epoch: int) -> None:
        self.last.fill_(epoch)


def test_a_hooks_loss_is_added_and_its_parameters_are_trained():
    hook, splits = Epochs(), make_splits(8)
    plain = fit(fresh(), splits, epochs=1, batch_size=8, update_epochs=1).history[0].train_loss
    hooked = fit(fresh(), splits, {"hook": hook}, epochs=1, batch_size=8, update_epochs=1).history[0].train_loss
    every = splits["train"].batch(torch.arange(8)).audio
    assert hooked == pytest.approx(plain + float(every.abs().mean()), rel=1e-5)
    assert hook.weight.item() == pytest.approx(1 - 0.05, rel=1e-4)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_hook_sees_every_row_once_an_epoch_in_shuffled_micro_batches(per_sample):
    seen: list = []
    fit(fresh(), make_splits(10), {"seen": Recorder(seen)}, per_sample=per_sample, epochs=2)
    for epoch in (1, 2):
        batches = [rows for number, rows in seen if number == epoch]
        assert [len(rows) for rows in batches] == [4, 4, 2]
        assert sorted(row for rows in batches for row in rows) == list(range(10))
    assert [rows for number, rows in seen if number == 1] != [rows for number, rows in seen if number == 2]


class Grouped(Linear):
    """Gives its own parameter groups, and freezes its bias."""

    def parameter_groups(self, config) -> list[dict]:
        self.linear.bias.requires_grad_(False)
        return [{"params": [self.linear.weight], "lr": 0.1}, {"params": [self.linear.bias], "lr": 0.2}]


def test_a_models_own_parameter_groups_and_where_hooks_join():
    model, hook = Grouped(), Epochs()
    optimizer = make_optimizer(model, [hook], Config())
    assert [(g["lr"], g["params"]) for g in optimizer.param_groups] == [
        (0.1, [model.linear.weight]),
        (0.2, [hook.weight]),
    ]


def test_rates_of_a_model_without_groups():
    class Plain(Training):
        """No learning rate of its own."""

    rates = [
        (g["lr"], g["weight_decay"])
        for config in (Config(learning_rate=0.3, weight_decay=0.1), Plain())
        for g in make_optimizer(fresh(), [], config).param_groups
    ]
    assert rates == [(0.3, 0.1), (1e-3, 0.0)]


def test_a_text_encoder_has_a_rate_of_its_own():
    model, hook = fresh(), Epochs()
    model.encoder = TextEncoder.from_config(TINY_BERT).build()
    encoder, rest = make_optimizer(model, [hook], Rates(learning_rate_bert=1e-6, weight_decay=0.1)).param_groups
    assert (encoder["lr"], rest["lr"]) == (1e-6, 1e-3)
    assert encoder["weight_decay"] == rest["weight_decay"] == 0.1
    assert encoder["params"] == list(model.encoder.parameters())
    assert rest["params"] == [*model.linear.parameters(), *hook.parameters()]


def test_the_train_loss_is_a_mean_over_micro_batches():
    splits, model = make_splits(16), fresh()
    batches = [splits["train"].batch(rows) for rows in torch.arange(16).split(4)]
    expected = np.mean([float((model(b).prediction - b.labels["M"]).detach().abs().mean()) for b in batches])
    outcome = fit(model, splits, epochs=1, update_epochs=4)  # one update, after the last loss
    assert outcome.history[0].train_loss == pytest.approx(expected, rel=1e-5)


def test_a_little_better_is_better_and_errors_are_not_clipped():
    splits = make_splits()
    assert fit(Scripted(splits, [0.3, 0.3 - 1e-5]), splits, epochs=2).best_epoch == 2
    assert fit(Scripted(splits, [4.0, 3.5]), splits, epochs=2).best_epoch == 2


@pytest.mark.parametrize("wrong", [lambda p: p[:, None], lambda p: p[:-1], lambda p: torch.cat([p, p])])
def test_a_prediction_of_wrong_shape_is_refused_in_evaluation_too(wrong):
    class Wrong(Linear):
        def forward(self, batch) -> FusionOutput:
            prediction = super().forward(batch).prediction
            return FusionOutput(prediction if self.training else wrong(prediction))

    with pytest.raises(RunFailed, match=r"prediction has shape \(\d+(, 1|,)\), not \(8,\)"):
        fit(Wrong(), make_splits())


def test_whether_training_moves_a_text_encoder():
    model = fresh()
    assert text_sums(model).shape == (0,)
    model.encoder = TextEncoder.from_config(TINY_BERT).build()
    before = text_sums(model)
    with torch.no_grad():
        model.linear.weight += 1
    assert text_sums(model).equal(before)
    with torch.no_grad():
        next(model.encoder.parameters())[0, 0] += 1e-3
    assert not text_sums(model).equal(before)
