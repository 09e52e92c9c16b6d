"""MLF_DNN, MTFN and MLMF: outputs, losses, gradients and a whole epoch of updates are upstream's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from easydict import EasyDict
from MMSA.trains import multiTask as UpstreamTrainers
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from baselines_compat import mlf_dnn, mlmf, mtfn
from baselines_compat.multi_task import TASKS
from registry.contract import Batch, FusionOutput
from registry.testing import check_model
from registry.training import make_optimizer
from tests.baselines import (
    as_upstream,
    assert_same,
    batch,
    configured,
    fine_tuned,
    give_weights,
    info,
    means,
    modality_nets,
    upstream,
)  # fmt: skip

MODULES = [mlf_dnn, mtfn, mlmf]
FEATURES = {"text": "Feature_t", "audio": "Feature_a", "vision": "Feature_v"}
SIZES = {"hidden_dims": (18, 14, 16), "post_text_dim": 17, "post_audio_dim": 13, "post_video_dim": 15}
OWN_SIZES = {
    "mlf_dnn": {"text_out": 11, "post_fusion_dim": 12},
    "mtfn": {"text_out": 11, "post_fusion_dim": 12},
    "mlmf": {"rank": 3},
}
DROPOUTS = {"dropouts": (0.1, 0.2, 0.3), "post_dropouts": (0.4, 0.3, 0.2, 0.1)}
NO_DROPOUT = {"dropouts": (0.0, 0.0, 0.0), "post_dropouts": (0.0, 0.0, 0.0, 0.0)}
WEIGHTS = {"M": 0.6, "T": 0.4, "A": 0.8, "V": 1.2}
RATES = {
    **{"learning_rate": 1e-3, "weight_decay": 0.5},
    **{"text_weight_decay": 0.1, "audio_weight_decay": 0.2, "video_weight_decay": 0.3},
}
PUBLISHED = json.loads((Path(mtfn.__file__).parent / "presets" / "mmsa.json").read_text("utf-8"))

by_model = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.SPEC.name)


def names(name: str) -> dict[str, str]:
    """Return our names of weights and upstream's."""
    theirs = {"text": "text", "audio": "audio", "vision": "video"}
    found = {f"single_task.{ours}": other for ours, other in modality_nets().items()}
    for modality, other in theirs.items():
        found |= {f"heads.{modality}.layer_{n}": f"post_{other}_layer_{n}" for n in (1, 2, 3)}
    if name != "mlmf":
        return found | {f"single_task.fusion.layer_{n}": f"post_fusion_layer_{n}" for n in (1, 2, 3)}
    found |= {f"single_task.factors.{modality}.weight": f"{other}_factor" for modality, other in theirs.items()}
    return found | {"single_task.sum.weight": "fusion_weights", "single_task.sum.bias": "fusion_bias"}


def options(module: ModuleType, **more: Any) -> dict[str, Any]:
    """Return small sizes and the rates that every test uses."""
    own = {"factor_lr": 2e-3} if module is mlmf else {}
    return {**SIZES, **OWN_SIZES[module.SPEC.name], **WEIGHTS, **RATES, **own, **more}


def pair(module: ModuleType, preset: str = "mmsa", **more: Any) -> tuple[nn.Module, nn.Module, Any]:
    """Return our model and upstream's with the same weights, both in evaluation mode, and our config."""
    values = options(module, **more)
    theirs = upstream(module.SPEC.name, **{"dataset_name": "sims", **values})
    g = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():  # with all of one size hardly a unit of the small heads is above 0
        if parameter.dim() > 1:
            parameter.data.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=g)
    if module is mtfn and preset == "mmsa":  # upstream publishes it for fusion and heads, and uses none
        values["weight_decay"] = 0.0
    config = configured(module.SPEC, preset, "sims", **values)
    ours = module.SPEC.build(config, info()).eval()
    give_weights(ours, theirs.Model, names(module.SPEC.name), unused=("output_",))
    return ours, theirs, config


def total(output: FusionOutput, labels: Mapping[str, Tensor]) -> Tensor:
    """Return the loss as the training loop adds it up."""
    return l1_loss(output.prediction, labels["M"]) + torch.stack(list(output.losses.values())).sum()


# --- against upstream


@by_model
@pytest.mark.parametrize("preset", ["mmsa", "corrected"])
def test_outputs_equal_upstreams(module, preset):
    ours, theirs, _ = pair(module, preset, **DROPOUTS)
    data = batch(tasks="MTAV", full=preset == "corrected")
    output, expected = ours(data), theirs(*means(data))
    assert_same(output, expected, FEATURES)
    for name, task in TASKS.items():
        torch.testing.assert_close(output.unimodal[name], expected[task].flatten(), atol=1e-5, rtol=1e-5)


@by_model
def test_loss_and_gradients_are_those_of_the_weighted_sum(module):
    ours, theirs, _ = pair(module, **NO_DROPOUT)
    data = batch(tasks="MTAV")
    loss = total(ours.train()(data), data.labels)
    outputs = theirs.train()(*means(data))
    expected = sum(w * l1_loss(outputs[task], data.labels[task][:, None]) for task, w in WEIGHTS.items())
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.backward()
    gradients = {n: p.grad for n, p in theirs.Model.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            theirs_name = upstream_name(module, name)
            torch.testing.assert_close(parameter.grad, gradients[theirs_name].reshape_as(parameter), msg=name)


def upstream_name(module: ModuleType, name: str) -> str:
    of = names(module.SPEC.name)
    prefix = max((p for p in of if name == p or name.startswith(f"{p}.")), key=len)
    return of[prefix] + name[len(prefix) :]


@by_model
def test_an_epoch_of_updates_is_upstreams(module):
    """Its own trainer makes them: rates, decays and untrained tensors are as there."""
    ours, theirs, config = pair(module, **NO_DROPOUT)
    ours, theirs = ours.double(), theirs.double()
    epoch = [doubled(batch(tasks="MTAV", seed=seed)) for seed in range(4)]
    told = {"dataset_name": "sims", "train_mode": "regression", "device": "cpu", "KeyEval": "Loss", "cur_seed": 1}
    arguments = EasyDict(told, model_name=module.SPEC.name, **options(module))
    trainer = getattr(UpstreamTrainers, module.SPEC.name.upper())(arguments)
    with pytest.raises(UnboundLocalError, match="train_results"):  # its log of the first epoch is broken
        trainer.do_train(theirs, {"train": [as_theirs(data) for data in epoch]})
    optimizer = make_optimizer(ours, [], config)
    for data in epoch:
        optimizer.zero_grad()
        total(ours.train()(data), data.labels).backward()
        optimizer.step()
    after = theirs.Model.state_dict()
    for name, tensor in ours.state_dict().items():
        expected = after[upstream_name(module, name)].reshape(tensor.shape)
        torch.testing.assert_close(tensor, expected, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: name + text)


def doubled(data: Batch) -> Batch:
    inputs = {name: getattr(data, name).double() for name in ("text", "audio", "vision")}
    labels = {task: values.double() for task, values in data.labels.items()}
    return Batch(**{**vars(data), **inputs, "labels": labels})


def as_theirs(data: Batch) -> dict[str, Any]:
    return {**dict(zip(("text", "audio", "vision"), means(data), strict=True)), "labels": dict(data.labels)}


@by_model
def test_each_dropout_is_where_upstream_has_it(module):
    ours, theirs, _ = pair(module, "corrected", **DROPOUTS)
    for name, other in (("text", "text"), ("audio", "audio"), ("vision", "video")):
        assert ours.heads[name].dropout.p == theirs.get_submodule(f"Model.post_{other}_dropout").p, name
    for name, other in (("audio", "audio"), ("vision", "video")):
        assert getattr(ours.nets, name).dropout.p == theirs.get_submodule(f"Model.{other}_subnet.drop").p, name
    assert ours.nets.text.dropout.p == theirs.Model.text_prob
    if module is not mlmf:  # upstream has it there, and never applies it
        assert ours.single_task.fusion.dropout.p == theirs.Model.post_fusion_prob


# --- the published figures


@by_model
def test_presets_are_the_published_figures(module):
    assert module.SPEC.presets["corrected"] == PUBLISHED[module.SPEC.name]
    assert module.SPEC.presets["mmsa"].keys() == {"sims", "simsv2"}


@pytest.mark.parametrize(("module", "dataset"), [(mlf_dnn, "sims"), (mtfn, "simsv2"), (mlmf, "sims")])
def test_defaults_are_published_too(module, dataset):
    published = configured(module.SPEC, "corrected", dataset)
    assert configured(module.SPEC).model_dump() == published.model_dump()


# --- what the models promise


@by_model
@pytest.mark.parametrize("change", [lambda spec: spec, fine_tuned, as_upstream], ids=["frozen", "tuned", "upstream"])
def test_keeps_the_contract(module, change):
    check_model(change(module.SPEC))


@by_model
def test_needs_a_label_of_each_modality(module):
    assert {"T", "A", "V"} <= set(module.SPEC.needs(configured(module.SPEC)))


@by_model
def test_there_is_no_loss_without_labels(module):
    ours, _, _ = pair(module, **NO_DROPOUT)
    output = ours(batch(tasks=""))
    assert output.losses == {}
    assert output.unimodal.keys() == TASKS.keys()


@by_model
def test_the_criterion_is_that_of_the_run(module):
    ours, _, _ = pair(module, **NO_DROPOUT, criterion="mse")
    data = batch(tasks="MTAV")
    output = ours(data)
    torch.testing.assert_close(output.losses["T"], 0.4 * mse_loss(output.unimodal["text"], data.labels["T"]))
    torch.testing.assert_close(output.losses["M"], -0.4 * mse_loss(output.prediction, data.labels["M"]))


@by_model
@pytest.mark.parametrize("preset", ["corrected", "mmsa"])
def test_a_step_moves_every_parameter_that_is_trained(module, preset):
    """Of `mmsa` that is all but the weights and bias of MLMF's sum."""
    config = configured(module.SPEC, preset, "sims", **options(module), finetune_text=True)
    model = module.SPEC.build(config, info())
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = make_optimizer(model, [], config)
    data = batch(tasks="MTAV", clips=5)  # an odd number, of which the L1's signs cannot cancel
    total(model.train()(data), data.labels).backward()
    optimizer.step()
    still = {name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])}
    untrained = {"single_task.sum.weight", "single_task.sum.bias"} if module is mlmf and preset == "mmsa" else set()
    assert {name for name in still if "encoder" not in name} == untrained


@by_model
def test_groups_hold_every_parameter_once(module):
    config = configured(module.SPEC, None, "sims", **options(module), finetune_text=True)
    model = module.SPEC.build(config, info())
    held = [id(parameter) for group in model.parameter_groups(config) for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


# --- corrections


@by_model
def test_padding_counts_upstream_and_not_here(module):
    data = batch(tasks="MTAV")
    corrected, as_there = (pair(module, preset, **NO_DROPOUT)[0](data) for preset in ("corrected", "mmsa"))
    for name in TASKS:
        assert not torch.allclose(corrected.unimodal[name], as_there.unimodal[name], atol=1e-3)


@by_model
def test_the_dropout_of_text_is_applied_here(module):
    data = batch(tasks="MTAV", full=True)
    only_text = {**NO_DROPOUT, "dropouts": (0.0, 0.0, 0.9)}
    for preset, changes in (("corrected", True), ("mmsa", False)):
        model = pair(module, preset, **only_text)[0].train()
        first, again = (model(data).unimodal["text"] for _ in range(2))
        assert torch.equal(first, again) != changes, preset


def test_mtfn_decays_fusion_and_heads_as_published():
    for preset, decay in (("corrected", 0.005), ("mmsa", 0.0)):
        config = configured(mtfn.SPEC, preset, "sims", hidden_dims=(8, 4, 6), text_out=5)
        (*_, others) = mtfn.SPEC.build(config, info()).parameter_groups(config)
        assert others["weight_decay"] == decay


@pytest.mark.parametrize(("preset", "limit"), [("corrected", 1.0), ("mmsa", 3.0)])
def test_mtfn_predicts_within_the_label_range(preset, limit):
    config = configured(mtfn.SPEC, preset, "sims", **options(mtfn))
    model = mtfn.SPEC.build(config, info(label_range=1.0)).eval()
    with torch.no_grad():
        model.single_task.fusion.layer_3.bias.fill_(50.0)
    assert model(batch(tasks="MTAV")).prediction.tolist() == [limit] * 6


@by_model
def test_a_batch_of_one_and_constant_inputs_are_finite(module):
    model = module.SPEC.build(configured(module.SPEC, None, "sims", **options(module)), info()).train()
    data = batch(tasks="MTAV", clips=1)
    for name in ("text", "audio", "vision"):
        getattr(data, name).zero_()
    output = model(data)
    total(output, data.labels).backward()
    assert output.prediction.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
