"""`check_model`: a sound model passes, and each kind of fault is caught by the check that is named after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from registry import Batch, BenchmarkError, DataInfo, FusionOutput, HookSpec, InputError, ModelSpec, TrainingHook
from registry.plugins import Plugins
from registry.testing import check_model, inspect_model

RUNS, SHAPES, GRADIENTS = "builds and runs", "shapes", "gradients reach every parameter"
COMPANY, BLIND = "padding and batch company do not change a prediction", "label blindness"
SAVED, PER_SAMPLE = "save and load", "per_sample"
CHECKS = [RUNS, SHAPES, GRADIENTS, COMPANY, BLIND, SAVED, PER_SAMPLE]


class Sound(nn.Module):
    """A small model that keeps the contract; the faulty ones change one thing of it."""

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__()
        self.encoder = nn.Linear(data.dims["audio"], 4)
        self.head = nn.Linear(4, 1)
        self.feature_dims = {"audio": 4}

    def pool(self, batch: Batch) -> Tensor:
        return batch.audio.sum(1) / batch.audio_lengths[:, None]  # padding is zero

    def encode(self, batch: Batch) -> Tensor:
        return torch.relu(self.encoder(self.pool(batch)))

    def forward(self, batch: Batch) -> Any:
        audio = self.encode(batch)
        return FusionOutput(prediction=self.head(audio).squeeze(-1), features={"audio": audio})


def spec_of(model: Callable[..., nn.Module], **options: Any) -> ModelSpec:
    return ModelSpec(**{"name": "small", "summary": "", "build": model, "needs": ("audio",), **options})


def faults(model: Callable[..., nn.Module], **options: Any) -> dict[str, str]:
    """Return the faults of a model by check."""
    return {check.name: check.fault for check in inspect_model(spec_of(model, **options)) if check.fault}


def only_fault(model: Callable[..., nn.Module], **options: Any) -> tuple[str, str]:
    """Return the check that caught a model, and its fault, where no other check did."""
    found = faults(model, **options)
    assert len(found) == 1, found
    return next(iter(found.items()))


# --- sound models


def test_self_mm_passes_every_check():
    results = inspect_model(Plugins().load("model", "self_mm"))
    assert [result.name for result in results] == CHECKS
    assert [result.fault for result in results] == [None] * len(CHECKS)


@pytest.mark.parametrize("per_sample", [True, False])
def test_a_sound_model_passes_every_check(per_sample):
    assert [result.name for result in inspect_model(spec_of(Sound))] == CHECKS
    assert faults(Sound, per_sample=per_sample) == {}
    assert check_model(spec_of(Sound)) is None


def test_dropout_and_batch_norm_are_no_fault_where_they_are_evaluated_properly():
    class Normed(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)

        def encode(self, batch: Batch) -> Tensor:
            return self.dropout(self.norm(super().encode(batch)))

    assert faults(Normed) == {}


def test_needs_decide_what_the_model_is_given():
    seen = {}

    class Text(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            seen["aligned"] = data.aligned

        def pool(self, batch: Batch) -> Tensor:
            seen["text"] = batch.text
            return super().pool(batch)

    assert faults(Text, needs=("audio",)) == {}
    assert seen == {"aligned": False, "text": None}
    assert faults(Text, needs=lambda config: ("audio", "text_features", "alignment")) == {}
    assert seen["aligned"]
    assert seen["text"].shape == (12, 10, 16)


def test_aligned_steps_stand_side_by_side():
    class Aligned(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.encoder = nn.Linear(sum(data.dims.values()), 4)

        def pool(self, batch: Batch) -> Tensor:
            steps = torch.cat([batch.text, batch.audio, batch.vision], dim=-1)
            return steps.sum(1) / batch.text_lengths[:, None]

    assert faults(Aligned, needs=("text_features", "audio", "vision", "alignment")) == {}


def test_what_only_hooks_train_is_no_fault():
    class Projected(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.project = nn.Linear(4, 4)

        def forward(self, batch: Batch) -> Any:
            output = super().forward(batch)
            return replace(output, features={"audio": self.project(output.features["audio"])})

    assert faults(Projected) == {}


def test_a_hook_that_is_not_installed_is_given():
    hook = HookSpec(name="not_installed", summary="", build=TrainingHook)
    spec = spec_of(Sound, hooks=("not_installed",))
    assert check_model(spec, [hook]) is None
    with pytest.raises(InputError, match="unknown hook 'not_installed'"):
        check_model(spec)


def test_needs_that_are_none():
    with pytest.raises(BenchmarkError, match="needs must be a tuple of text, text_features"):
        check_model(spec_of(Sound, needs=("sound",)))


def test_what_a_model_does_not_ask_for_is_withheld():
    class Greedy(Sound):
        def pool(self, batch: Batch) -> Tensor:
            return super().pool(batch) * batch.text_ids.shape[1]

    assert set(faults(Greedy, needs=("audio",))) == {RUNS}
    assert set(faults(Sound, needs=("text", "vision"))) == {RUNS}


def test_a_mean_over_padded_text_features():
    class Text(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.text = nn.Linear(data.dims["text"], 4)

        def encode(self, batch: Batch) -> Tensor:
            return super().encode(batch) + self.text(batch.text.mean(1))

    assert set(faults(Text, needs=("audio", "text_features"))) == {COMPANY}


def test_a_preset_of_a_model_with_hooks_may_hold_their_keys():
    spec = spec_of(Sound, hooks=("ulgm",), presets={"mine": {"mosi": {"hook.distance": "cosine"}}})
    assert [check.fault for check in inspect_model(spec)] == [None] * len(CHECKS)


# --- a model that does not run has one result only


def test_a_constructor_that_raises():
    class Raises(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            raise ValueError("no room")

    (result,) = inspect_model(spec_of(Raises))
    assert (result.name, result.fault) == (RUNS, "ValueError: no room")


def test_a_forward_that_raises():
    class Raises(Sound):
        def encode(self, batch: Batch) -> Tensor:
            return batch.audio @ batch.audio_lengths

    (result,) = inspect_model(spec_of(Raises))
    assert result.name == RUNS
    assert "RuntimeError" in result.fault


def test_a_tensor_is_no_fusion_output():
    class Bare(Sound):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch).prediction

    (result,) = inspect_model(spec_of(Bare))
    assert (result.name, result.fault) == (RUNS, "forward must return a FusionOutput, got Tensor")


# --- shapes


def changed(**changes: Callable[[FusionOutput, Batch], Any]) -> type[Sound]:
    """Return `Sound` with fields of its output replaced by functions of the output and the batch."""

    class Changed(Sound):
        def forward(self, batch: Batch) -> FusionOutput:
            output = super().forward(batch)
            fields = {name: change(output, batch) for name, change in changes.items()}
            return FusionOutput(**{**vars(output), **fields})

    return Changed


def test_a_prediction_of_wrong_shape():
    model = changed(prediction=lambda output, batch: output.prediction[:, None])
    assert only_fault(model) == (SHAPES, "prediction must have shape (12,), got (12, 1)")


def test_a_prediction_that_is_not_finite():
    found = faults(changed(prediction=lambda output, batch: output.prediction * float("inf")))
    assert found[SHAPES] == "prediction is not finite"


def test_a_model_without_feature_dims():
    class Silent(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            del self.feature_dims

    name, fault = only_fault(Silent)
    assert name == SHAPES
    assert "no feature_dims" in fault


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda output, batch: {"audio": output.features["audio"][:, :3]}, "{'audio': (12, 3)}"),
        (lambda output, batch: {"fusion": output.features["audio"]}, "{'fusion': (12, 4)}"),
        (lambda output, batch: {}, "{}"),
        (lambda output, batch: {"audio": output.features["audio"][:, None]}, "{'audio': (12, 1, 4)}"),
    ],
    ids=["width", "name", "none", "dimensions"],
)
def test_feature_dims_that_do_not_match_the_features(change, found):
    name, fault = only_fault(changed(features=change))
    assert name == SHAPES
    assert fault == f"feature_dims says {{'audio': 4}}, forward returns features of shape {found}, B is 12"


def test_features_of_too_few_clips():
    # ULGM would store them at the wrong rows.
    assert SHAPES in faults(changed(features=lambda output, batch: {"audio": output.features["audio"][:1]}))


def test_a_unimodal_prediction_of_wrong_shape():
    # (B, 1) against labels (B) broadcasts to (B, B) without a word.
    name, _ = only_fault(changed(unimodal=lambda output, batch: {"audio": output.prediction[:, None]}))
    assert name == SHAPES


def test_losses_that_are_not_scalars():
    model = changed(losses=lambda output, batch: {"a": output.prediction.mean(), "b": output.prediction})
    found = faults(model)
    assert found[SHAPES] == "losses must be scalars, b is not"


# --- gradients


def test_a_parameter_that_gets_no_gradient():
    class Idle(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.idle = nn.Linear(2, 2)

    assert only_fault(Idle) == (
        GRADIENTS,
        "2 of 6 parameters get none: idle.weight, idle.bias "
        "(freeze what is not to be trained with requires_grad_(False))",
    )


def test_a_parameter_that_no_group_holds():
    class Forgetful(Sound):
        def parameter_groups(self, config: Any) -> list[dict]:
            return [{"params": list(self.parameters())[:-1], "lr": 0.1}]

    name, fault = only_fault(Forgetful)
    assert (name, fault.startswith("parameter_groups leaves out ")) == (GRADIENTS, True)


def test_a_frozen_parameter_needs_no_gradient():
    class Frozen(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    assert faults(Frozen) == {}


def test_parameters_may_be_reached_through_losses_and_unimodal_predictions():
    class Indirect(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.own, self.extra = nn.Linear(4, 1), nn.Parameter(torch.ones(3))

        def forward(self, batch: Batch) -> FusionOutput:
            output = super().forward(batch)
            unimodal = {"audio": self.own(output.features["audio"]).squeeze(-1)}
            return FusionOutput(output.prediction, output.features, unimodal, {"size": self.extra.square().sum()})

    assert faults(Indirect) == {}


# --- padding and company


class Pooled(Sound):
    """`Sound` whose pooling is given."""

    def __init__(self, config: Any, data: DataInfo, how: Callable[[Batch], Tensor]) -> None:
        super().__init__(config, data)
        self.pool = how


def pooled(how: Callable[[Batch], Tensor]) -> Callable[..., nn.Module]:
    return lambda config, data: Pooled(config, data, how)


def own_mean(batch: Batch) -> Tensor:
    return batch.audio.sum(1) / batch.audio_lengths[:, None]


UNSTABLE = {
    "mean over padding": lambda batch: batch.audio.mean(1),
    "last step, padding or not": lambda batch: batch.audio[:, -1],
    "longest of the batch": lambda batch: own_mean(batch) / batch.audio_lengths.max(),
    "batch mean": lambda batch: own_mean(batch) - own_mean(batch).mean(0),
    "rank in the batch": lambda batch: own_mean(batch) + torch.arange(len(batch))[:, None],
    "padding of another modality": lambda batch: own_mean(batch) * batch.vision.shape[1],
    "padding of the text": lambda batch: own_mean(batch) * batch.text_ids.shape[1],
}


@pytest.mark.parametrize("how", UNSTABLE)
def test_a_prediction_that_depends_on_padding_or_company(how):
    name, fault = only_fault(pooled(UNSTABLE[how]), needs=("text", "audio", "vision"))
    assert name == COMPANY
    assert "away from the same clip in a batch" in fault


def test_batch_statistics_that_are_not_defined_for_one_clip():
    # The deviation over one clip is NaN, and NaN is not greater than any tolerance.
    def standardised(batch: Batch) -> Tensor:
        return (own_mean(batch) - own_mean(batch).mean(0)) / own_mean(batch).std(0, correction=0)

    assert only_fault(pooled(standardised))[0] == COMPANY


def test_batch_norm_that_keeps_no_running_statistics():
    class Normed(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.norm = nn.BatchNorm1d(data.dims["audio"], affine=False, track_running_stats=False)

        def pool(self, batch: Batch) -> Tensor:
            return self.norm(super().pool(batch)) if len(batch) > 1 else super().pool(batch)

    assert only_fault(Normed)[0] == COMPANY


# --- label blindness


@pytest.mark.parametrize(
    "peek",
    [
        lambda batch: batch.labels["M"],
        lambda batch: batch.labels.get("M", torch.zeros(len(batch))),
        lambda batch: batch.labels.get("T", torch.zeros(len(batch))),
        lambda batch: batch.index.float(),
    ],
    ids=["label", "label where there is one", "unimodal label", "row number"],
)
def test_a_model_that_peeks(peek):
    model = changed(prediction=lambda output, batch: output.prediction + 0.01 * peek(batch))
    assert only_fault(model)[0] == BLIND


# --- save and load


class Stateful(Sound):
    """`Sound` that adds to its input a tensor which its state_dict lacks."""

    def __init__(self, config: Any, data: DataInfo, make: Callable[[int], Any]) -> None:
        super().__init__(config, data)
        self.offset = torch.as_tensor(make(data.dims["audio"]), dtype=torch.float32)

    def pool(self, batch: Batch) -> Tensor:
        return super().pool(batch) + self.offset


def unseeded() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


@pytest.mark.parametrize(
    "make",
    [
        lambda width: np.random.default_rng().normal(size=width),
        lambda width: torch.randn(width),
        lambda width: torch.randn(width, generator=unseeded()),
    ],
    ids=["numpy", "torch's global generator", "a generator of its own"],
)
def test_state_that_the_state_dict_lacks(make):
    name, fault = only_fault(lambda config, data: Stateful(config, data, make))
    assert name == SAVED
    assert "some state is not in it" in fault


def test_a_constant_tensor_need_not_be_saved():
    assert faults(lambda config, data: Stateful(config, data, lambda width: np.arange(width))) == {}


def test_state_that_changes_with_every_forward():
    class Counts(Sound):
        calls = 0

        def pool(self, batch: Batch) -> Tensor:
            self.calls += 1
            return super().pool(batch) + self.calls

    assert SAVED in faults(Counts)


# --- per_sample


def test_per_sample_with_batch_norm():
    class Normed(Sound):
        def __init__(self, config: Any, data: DataInfo) -> None:
            super().__init__(config, data)
            self.norm = nn.BatchNorm1d(4)

        def encode(self, batch: Batch) -> Tensor:
            return self.norm(super().encode(batch))

    assert faults(Normed) == {}
    name, fault = only_fault(Normed, per_sample=True)
    assert name == PER_SAMPLE
    assert "per_sample=True" in fault
    assert "BatchNorm (norm)" in fault


def test_per_sample_with_batch_level_losses():
    contrastive = changed(losses=lambda output, batch: {"spread": output.prediction.std(correction=0)})
    assert faults(contrastive) == {}
    assert only_fault(contrastive, per_sample=True)[0] == PER_SAMPLE


def test_per_sample_with_batch_statistics_in_training_only():
    # Evaluation hides it, and a group that runs as one forward would be trained otherwise than announced.
    class Mixes(Sound):
        def pool(self, batch: Batch) -> Tensor:
            pooled = super().pool(batch)
            return pooled - pooled.mean(0) if self.training else pooled

    assert only_fault(Mixes, per_sample=True)[0] == PER_SAMPLE


# --- the whole


class Many(Sound):
    """Breaks four requirements at once."""

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__(config, data)
        self.idle = nn.Parameter(torch.zeros(3))
        self.feature_dims = {}

    def pool(self, batch: Batch) -> Tensor:
        return batch.audio.mean(1) + batch.index[:, None]


def test_check_model_lists_every_fault():
    with pytest.raises(BenchmarkError) as caught:
        check_model(spec_of(Many))
    found = faults(Many)
    assert list(found) == [SHAPES, GRADIENTS, COMPANY, BLIND]
    assert str(caught.value) == "small breaks the contract: " + "; ".join(f"{k}: {v}" for k, v in found.items())
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["self_mm", "dropout"])
def test_the_global_random_state_is_left_as_it_was(name):
    class Dropped(Sound):
        def encode(self, batch: Batch) -> Tensor:
            return nn.functional.dropout(super().encode(batch), 0.5, self.training)

    spec = Plugins().load("model", name) if name == "self_mm" else spec_of(Dropped)
    torch.manual_seed(5)
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert all(result.fault is None for result in inspect_model(spec))
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


def test_the_same_model_gets_the_same_verdict_whatever_the_global_seed():
    verdicts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        verdicts.append(faults(pooled(UNSTABLE["batch mean"])))
    assert verdicts[0] == verdicts[1]
