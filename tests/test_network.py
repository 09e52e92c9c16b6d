"""The Self-MM network: lengths, layers and directions, subsets of modalities, parameter groups."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from registry import Batch, DataInfo, TextEncoder
from selfmm_plugin.network import SelfMM, SelfMMConfig, SequenceEncoder

from .helpers import TINY_BERT


def info() -> DataInfo:
    encoder = TextEncoder.from_config(TINY_BERT)
    return DataInfo(
        name="test",
        dims={"text": encoder.width, "audio": 5, "vision": 3},
        max_lengths={},
        n_train=4,
        label_range=3.0,
        tasks=("M",),
        aligned=False,
        text_encoder=encoder,
    )


def batch() -> Batch:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return Batch(
        index=torch.arange(2),
        text_ids=torch.randint(5, 50, (2, 4)) * mask,
        text_mask=mask,
        text_segments=torch.zeros_like(mask),
        audio=torch.randn(2, 6, 5),
        audio_lengths=torch.tensor([6, 2]),
        vision=torch.randn(2, 3, 3),
        vision_lengths=torch.tensor([1, 3]),
    )


@pytest.mark.parametrize(
    "modalities", [c for n in (1, 2, 3) for c in itertools.combinations(("text", "audio", "vision"), n)]
)
def test_any_subset_of_modalities(modalities: tuple[str, ...]) -> None:
    config = SelfMMConfig(modalities=modalities)
    model = SelfMM(config, info())
    output = model(batch())
    assert output.prediction.shape == (2,)
    assert {name: feature.shape[1] for name, feature in output.features.items()} == model.feature_dims
    assert set(model.feature_dims) == {*modalities, "fusion"}
    grouped = [id(p) for group in model.parameter_groups(config) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_gives_the_state_at_the_last_real_step(layers: int, bidirectional: bool) -> None:
    torch.manual_seed(0)
    encoder = SequenceEncoder(5, 4, 4, layers=layers, bidirectional=bidirectional, dropout=0.0)
    encoder.linear = nn.Identity()
    sequence, lengths = torch.randn(3, 7, 5), torch.tensor([7, 3, 1])
    found = encoder(sequence, lengths)
    for clip, length in enumerate(lengths.tolist()):
        states, _ = encoder.rnn(sequence[clip : clip + 1, :length])
        expected = torch.cat([states[0, -1, :4], states[0, 0, 4:]])
        torch.testing.assert_close(found[clip], expected)


def test_weight_decay_spares_biases_and_layer_norms_of_the_text_encoder() -> None:
    config = SelfMMConfig(weight_decay_bert=0.5)
    model = SelfMM(config, info())
    names = {id(parameter): name for name, parameter in model.encoders["text"].named_parameters()}
    decayed, spared = model.parameter_groups(config)[:2]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert all("bias" not in names[id(p)] and "LayerNorm" not in names[id(p)] for p in decayed["params"])
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_dropout_of_the_config_reaches_its_layers() -> None:
    config = SelfMMConfig(a_lstm_layers=2, a_lstm_dropout=0.3, v_lstm_dropout=0.4, post_fusion_dropout=0.2)
    model = SelfMM(config, info())
    assert (model.encoders["audio"].rnn.dropout, model.encoders["audio"].dropout.p) == (0.3, 0.3)
    assert (model.encoders["vision"].rnn.dropout, model.encoders["vision"].dropout.p) == (0.0, 0.4)
    assert model.fusion.dropout.p == 0.2


@pytest.mark.parametrize("modalities", [(), ("text", "text"), ("text", "smell")])
def test_wrong_modalities_are_refused(modalities: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="modalities"):
        SelfMMConfig(modalities=modalities)
