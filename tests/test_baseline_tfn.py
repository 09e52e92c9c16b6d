"""TFN, LF_DNN and the text-only baseline, and what the baselines share."""

from __future__ import annotations

import pytest
import torch

from baselines_compat import lf_dnn, text_only, tfn
from baselines_compat.layers import Normalise, TextInput, align, last_state, mean_over_steps
from registry.testing import check_model
from tests.baselines import (
    CLIPS,
    DIMS,
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

SIZES = {"hidden_dims": (8, 4, 6), "text_out": 5, "post_fusion_dim": 12}
DROPOUTS = (0.1, 0.2, 0.3, 0.4)
HEAD = {f"fusion.layer_{n}": f"post_fusion_layer_{n}" for n in (1, 2, 3)}
FEATURES = {"text": "Feature_t", "audio": "Feature_a", "vision": "Feature_v"}
SPECS = [text_only.SPEC, lf_dnn.SPEC, tfn.SPEC]


@pytest.mark.parametrize("module", [lf_dnn, tfn], ids=["lf_dnn", "tfn"])
def test_equals_upstream(module):
    theirs = upstream(module.SPEC.name, **SIZES, dropouts=DROPOUTS)
    config = configured(module.SPEC, "mmsa", **SIZES, dropouts=DROPOUTS)
    ours = module.SPEC.build(config, info()).eval()
    give_weights(ours, theirs.Model, {**modality_nets(), **HEAD}, unused=("output_",))
    data = batch()
    assert_same(ours(data), theirs(*means(data)), FEATURES)


def test_padding_counts_upstream_and_not_here():
    theirs, data = upstream("tfn", **SIZES, dropouts=DROPOUTS), batch()
    predictions = []
    for name in ("corrected", "mmsa"):
        ours = tfn.SPEC.build(configured(tfn.SPEC, name, **SIZES), info()).eval()
        give_weights(ours, theirs.Model, {**modality_nets(), **HEAD}, unused=("output_",))
        predictions.append(ours(data).prediction)
    assert not torch.allclose(*predictions, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("change", [lambda spec: spec, fine_tuned], ids=["frozen", "fine-tuned"])
def test_keeps_the_contract(spec, change):
    check_model(change(spec))


@pytest.mark.parametrize("spec", [lf_dnn.SPEC, tfn.SPEC], ids=lambda spec: spec.name)
def test_keeps_the_contract_as_upstream(spec):
    check_model(as_upstream(spec))


@pytest.mark.parametrize("label_range", [1.0, 3.0])
def test_tfn_predicts_within_the_label_range(label_range):
    model = tfn.SPEC.build(configured(tfn.SPEC), info(label_range=label_range)).eval()
    with torch.no_grad():
        model.fusion.layer_3.bias.fill_(50.0)
    assert model(batch()).prediction.tolist() == [label_range] * CLIPS


def test_a_fine_tuned_encoder_has_groups_of_its_own():
    config = configured(tfn.SPEC, finetune_text=True)
    model = tfn.SPEC.build(config, info())
    decayed, spared, others = model.parameter_groups(config)
    assert (decayed["lr"], decayed["weight_decay"]) == (5e-5, 1e-3)
    assert (spared["lr"], spared["weight_decay"]) == (5e-5, 0.0)
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.text.parameters()))
    assert sum(len(group["params"]) for group in (decayed, spared, others)) == len(list(model.parameters()))


def test_text_only_reads_the_first_token_or_the_mean():
    data = batch()
    frozen = text_only.SPEC.build(configured(text_only.SPEC), info()).eval()
    torch.testing.assert_close(frozen(data).features["text"], mean_over_steps(data.text, data.text_lengths))
    tuned = text_only.SPEC.build(configured(text_only.SPEC, finetune_text=True), info()).eval()
    states = tuned.text.encoder(data.text_ids, data.text_mask, data.text_segments)
    torch.testing.assert_close(tuned(data).features["text"], states[:, 0])


# --- layers


def test_means_are_over_real_steps():
    sequence = torch.tensor([[[1.0], [3.0], [9.0]], [[2.0], [4.0], [6.0]]])
    assert mean_over_steps(sequence, torch.tensor([2, 3])).tolist() == [[2.0], [4.0]]
    assert mean_over_steps(sequence, None)[0].item() == pytest.approx(13 / 3)


def test_a_state_after_the_last_real_step():
    rnn = torch.nn.LSTM(2, 3, batch_first=True)
    sequence = torch.randn(2, 4, 2)
    found = last_state(rnn, sequence, torch.tensor([4, 2]))
    torch.testing.assert_close(found[1], rnn(sequence[1:, :2])[1][0][0, 0])
    torch.testing.assert_close(found[0], last_state(rnn, sequence, None)[0])


def test_alignment_spreads_and_pools():
    sequence = torch.arange(1.0, 7.0).reshape(1, 6, 1)
    pooled = align(sequence, torch.tensor([6]), torch.tensor([3]), 4)
    assert pooled.flatten().tolist() == [1.5, 3.5, 5.5, 0.0]  # the fourth step is padding
    spread = align(sequence, torch.tensor([2]), torch.tensor([4]), 4)
    assert spread.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]
    uneven = align(sequence, torch.tensor([5]), torch.tensor([2]), 2)
    assert uneven.flatten().tolist() == [2.0, 4.0]  # steps 1-3 and 3-5: a step between two counts in both
    same = align(sequence, torch.tensor([4]), torch.tensor([4]), 6)
    assert same.flatten().tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0]


def test_normalisation_takes_a_batch_of_one():
    norm = Normalise(3).train()
    norm.running_mean.fill_(1.0)
    assert norm(torch.ones(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    assert norm(torch.randn(50, 3)).mean(0).abs().max() < 1e-5


def test_text_features_of_unknown_length_count_whole():
    data = batch()
    object.__setattr__(data, "text_lengths", None)
    states, lengths = TextInput(configured(tfn.SPEC), info())(data)
    assert states is data.text
    assert lengths.tolist() == [9] * CLIPS
    assert states.shape[2] == DIMS["text"]
