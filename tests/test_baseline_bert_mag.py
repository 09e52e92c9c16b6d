"""MAG-BERT against upstream's: outputs, alignment, a whole epoch of training; and the text encoders it takes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from easydict import EasyDict
from MMSA.trains.singleTask import BERT_MAG
from torch import nn
from transformers import BertConfig

from baselines_compat import bert_mag
from registry.data.text import TextEncoder
from registry.errors import InputError
from registry.testing import check_model
from tests.baselines import (
    ALIGNED,
    DIMS,
    LENGTHS,
    as_upstream,
    batch,
    configured,
    give_weights,
    info,
    upstream,
)  # fmt: skip
from tests.helpers import TINY_BERT
from tests.test_baseline_misa import tokens, train_both, without_dropout

NAMES = {
    **{"text.encoder.model": "model.bert", "head": "model.classifier"},
    **{"gate.gates.vision": "model.bert.MAG.W_hv", "gate.gates.audio": "model.bert.MAG.W_ha"},
    **{"gate.shifts.vision": "model.bert.MAG.W_v", "gate.shifts.audio": "model.bert.MAG.W_a"},
    "gate.norm": "model.bert.MAG.LayerNorm",
}


@pytest.fixture
def pair(monkeypatch):
    """Return upstream's model, and ours with its weights; upstream's needs what transformers 5 has no more."""
    module = sys.modules["MMSA.models.singleTask.BERT_MAG"]
    encoder, whole = module.MAG_BertModel, module.MAG_BertForSequenceClassification
    lowest = torch.finfo(torch.float32).min
    missing = {
        "get_extended_attention_mask": lambda self, mask, *_: (1 - mask[:, None, None].to(self.dtype)) * lowest,
        "get_head_mask": lambda *_: None,
        "all_tied_weights_keys": {},
    }
    for name, value in missing.items():
        monkeypatch.setattr(encoder, name, value, raising=False)
    monkeypatch.setattr(whole, "all_tied_weights_keys", {}, raising=False)
    monkeypatch.setattr(whole, "from_pretrained", lambda _, args, num_labels: whole(_bert(num_labels), args))

    def make(preset="mmsa", lengths=LENGTHS, **settings):
        settings = {"beta_shift": 0.4, "dropout_prob": 0.3, **settings}
        theirs = upstream("bert_mag", lengths, language="en", need_model_aligned=True, **settings)
        ours = bert_mag.SPEC.build(configured(bert_mag.SPEC, preset, **settings), info(lengths)).eval()
        give_weights(ours, theirs.Model, NAMES)
        return without_dropout(theirs, ours)

    return make


def _bert(num_labels):
    return BertConfig(**TINY_BERT, num_labels=num_labels)


def assert_equal(theirs, ours, data):
    expected = theirs(tokens(data), data.audio, data.vision)["M"].flatten()
    torch.testing.assert_close(ours(data).prediction, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 50.0])
def test_equals_upstream(pair, beta):
    assert_equal(*pair(beta_shift=beta, lengths=ALIGNED), batch(ALIGNED))


@pytest.mark.parametrize("lengths", [LENGTHS, {"text": 9, "audio": 27, "vision": 4}], ids=["uneven", "shorter"])
def test_aligns_as_upstream(pair, lengths):
    theirs, ours = pair(lengths=lengths)
    assert_equal(theirs, ours, batch(lengths))
    corrected = pair("corrected", lengths)[1]
    assert not torch.allclose(corrected(batch(lengths)).prediction, ours(batch(lengths)).prediction, atol=1e-3)


def test_the_corrected_one_equals_upstream_on_aligned_data(pair):
    assert_equal(*pair("corrected", ALIGNED), batch(ALIGNED))


def test_trains_as_upstream(pair):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.0}
    theirs, ours = pair(lengths=ALIGNED)
    before = {name: tensor.double() for name, tensor in ours.state_dict().items()}
    config = configured(bert_mag.SPEC, "mmsa", **settings, learning_rate_bert=1e-2, batch_size=4)
    fixed = {"train_mode": "regression", "dataset_name": "mosi", "KeyEval": "Loss", "device": torch.device("cpu")}
    args = EasyDict(fixed, **settings, model_name="bert_mag", cur_seed=0)
    train_both(BERT_MAG(args), theirs, ours, config, batch(ALIGNED, clips=18))
    expected = bert_mag.SPEC.build(config, info(ALIGNED)).double()
    give_weights(expected, theirs.Model, NAMES)
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), atol=1e-6, rtol=1e-6)
    still = [n for n, p in ours.named_parameters() if torch.allclose(p, before[n], atol=1e-4) and "key.bias" not in n]
    assert not still


@pytest.mark.parametrize("dataset", ["mosi", "mosei", "sims"])
def test_presets(dataset):
    config = configured(bert_mag.SPEC, "corrected", dataset)
    assert (config.learning_rate_bert, config.weight_decay_bert) == (config.learning_rate, config.weight_decay)
    assert config.criterion == "l1"
    assert configured(bert_mag.SPEC, "mmsa", dataset).as_upstream
    if dataset == "mosi":
        defaults = bert_mag.SPEC.config()
        assert {key: getattr(config, key) for key in bert_mag.SPEC.config.model_fields} == defaults.model_dump()


# --- the gate


def gate(limit):
    torch.manual_seed(0)
    made = bert_mag.Gate({"audio": 3, "vision": 2}, 4, limit, 0.0)
    made.norm = nn.Identity()
    return made


def test_a_token_moves_no_further_than_the_limit():
    text, beside = torch.randn(2, 5, 4), {"audio": 50 * torch.randn(2, 5, 3), "vision": 50 * torch.randn(2, 5, 2)}
    moved = (gate(0.5)(text, beside) - text).norm(dim=-1)
    assert (moved <= 0.5 * text.norm(dim=-1) + 1e-5).all()
    assert moved.max() > 0.1


def test_silence_moves_nothing_and_has_a_gradient():
    text, beside = torch.randn(2, 5, 4), {"audio": torch.zeros(2, 5, 3), "vision": torch.zeros(2, 5, 2)}
    made = gate(1.0)
    for layer in (*made.gates.values(), *made.shifts.values()):
        nn.init.zeros_(layer.bias)
    found = made(text.requires_grad_(), beside)
    assert torch.equal(found, text)
    found.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (text, *made.parameters()))


def test_new_layers_start_as_the_encoder_s():
    wide = TextEncoder.from_config({**TINY_BERT, "hidden_size": 64, "initializer_range": 0.01}, name="wide")
    data = replace(info(), text_encoder=wide, dims={**DIMS, "text": 64})
    model = bert_mag.SPEC.build(configured(bert_mag.SPEC), data)
    for layer in (*model.gate.gates.values(), *model.gate.shifts.values(), model.head):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.3)
        assert not layer.bias.any()


# --- text encoders, and the contract


def encoder_of(kind):
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32} if kind == "distilbert" else {}
    return TextEncoder.from_config({**TINY_BERT, **sizes, "model_type": kind}, name=kind)


@pytest.mark.parametrize("kind", bert_mag.ENCODERS)
def test_takes_the_encoder(kind):
    model = bert_mag.SPEC.build(configured(bert_mag.SPEC), replace(info(), text_encoder=encoder_of(kind))).eval()
    data = batch()
    prediction = model(data).prediction
    assert prediction.isfinite().all()
    assert not torch.allclose(prediction, model(replace(data, audio=data.audio + 1)).prediction, atol=1e-7)
    alone = data[3:4]
    torch.testing.assert_close(model(alone).prediction, prediction[3:4], atol=1e-6, rtol=1e-5)
    assert not model.text.encoder.model.embeddings._forward_hooks


def test_another_encoder_is_refused():
    data = replace(info(), text_encoder=encoder_of("electra"))
    with pytest.raises(InputError, match="type 'electra': pass one of bert, camembert, distilbert, mpnet, roberta"):
        bert_mag.SPEC.build(configured(bert_mag.SPEC), data)


def test_a_frozen_encoder_is_refused():
    with pytest.raises(InputError, match="'finetune_text' must be true, as the gate sits inside the text encoder"):
        configured(bert_mag.SPEC, finetune_text=False)


@pytest.mark.parametrize("change", [lambda spec: spec, as_upstream], ids=["corrected", "upstream"])
def test_keeps_the_contract(change):
    check_model(change(bert_mag.SPEC))
