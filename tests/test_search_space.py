"""What a search tries: ranges and choices of a model, of a file and of the command line."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import Range
from registry.errors import InputError
from registry.jobs import make_plan
from registry.plugins import Plugins
from registry.search_space import make_space, parse_search


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=1e-4..1e-2:log", {"low": 1e-4, "high": 1e-2, "log": True}),
        ("k = 1 .. 8", {"low": 1, "high": 8, "log": False}),
        ("k=-2..-1", {"low": -2, "high": -1, "log": False}),
        ("k=16,32,64", [16, 32, 64]),
        ("k=l1", ["l1"]),
        ("k=true,none,0.5", [True, None, 0.5]),
        ("k=64,16,64|128,32,128", [[64, 16, 64], [128, 32, 128]]),
        ("k=text,audio|text", [["text", "audio"], ["text"]]),
    ],
)
def test_what_search_set_reads(text, values):
    assert parse_search([text]) == {"k": values}


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_one_sentence(text):
    with suppress(InputError):
        assert len(parse_search([text])) == 1


@pytest.fixture(scope="module")
def plan():
    return make_plan("mfn", "mosi")


def test_layers(plan, tmp_path):
    """A file replaces the model's own; what is given is added; what is set is left out."""
    (tmp_path / "space.toml").write_text("memsize = [32, 64]\n[gamma1Config]\ndrop = {low = 0.1, high = 0.5}\n")
    space = make_space(plan, {"batch_size": [16]}, file=tmp_path / "space.toml")
    assert {key: str(dimension) for key, dimension in space.items()} == {
        "memsize": "32 | 64",
        "gamma1Config.drop": "0.1 to 0.5",
        "batch_size": "16",
    }
    fixed = {"memsize": 64, "gamma1Config": {"drop": 0.2}}
    assert list(make_space(plan, {"batch_size": [16]}, file=tmp_path / "space.toml", fixed=fixed)) == ["batch_size"]


def test_integers_stay_integers_and_numbers_become_numbers(plan):
    space = make_space(plan, {"memsize": {"low": 8, "high": 16}, "learning_rate": Range(0, 1)}, file="none")
    assert type(space["memsize"].values.low) is int
    assert type(space["learning_rate"].values.high) is float


def test_a_list_is_stored_as_text_and_read_as_it_was(plan):
    dimension = make_space(plan)["hidden_dims"]
    assert dimension.value(dimension.stored([64, 16, 64])) == [64, 16, 64]
    assert all(isinstance(stored, str) for stored in dimension.distribution().choices)


def test_other_spellings_and_hooks():
    plan = make_plan("self_mm", "mosi")
    assert list(make_space(plan, {"H": [1.0, 3.0], "hook.distance": ["l2", "cosine"]}, file="none")) == [
        "label_range",
        "hook.distance",
    ]
    with pytest.raises(InputError, match=r"unknown key 'hook\.distanc', did you mean 'hook\.distance'"):
        make_space(plan, {"hook.distanc": ["l2"]})


def test_a_table_and_its_entry_cannot_both_be_searched(plan):
    with pytest.raises(InputError, match="NN1Config and an entry of it are both to be searched"):
        make_space(plan, {"NN1Config": [{"drop": 0.0, "shapes": 32}]})


def test_a_model_that_declares_a_key_it_has_not_is_refused(tmp_path):
    source = """
import torch
from registry import register_model

@register_model("m", search={"learning_rat": [1]})
class Model(torch.nn.Module): pass
"""
    (tmp_path / "m.py").write_text(source)
    with pytest.raises(InputError, match="search has 'learning_rat', which is no config key"):
        Plugins([str(tmp_path / "m.py")]).load("model", "m")
    (tmp_path / "m.py").write_text(source.replace("learning_rat", "epochs"))
    assert Plugins([str(tmp_path / "m.py")]).load("model", "m").search == {"epochs": (1,)}


DATASETS = {"mtfn": "sims", "mlf_dnn": "sims", "mlmf": "sims"}
OURS = files("baselines_compat") / "presets" / "search.json"
UPSTREAM = json.loads((files("MMSA") / "config" / "config_tune.json").read_text("utf-8"))
OUR_NAME = {"grad_clip": "clip_value", "patience": "scheduler_patience"}
LEFT_OUT = {
    "self_mm": {"learning_rate_bert", "text_out", "audio_out", "video_out", "a_lstm_dropout", "v_lstm_dropout", "H"}
    | {"t_bert_dropout"},
    "misa": {"sp_weight", "reverse_grad_weight"},
    "mfm": {"outConfig", "windowsize"},
    "mfn": {"windowsize"},
    "bert_mag": {"beta_shift"},
}
"""what upstream never varies, or what changes nothing"""
OURS_TOO = {"learning_rate_bert", "weight_decay_bert"}
"""which upstream has as one with the other rate and decay of these two"""


def test_the_space_of_a_model_that_upstream_has_not():
    assert str(make_space(make_plan("text_only", "mosi"))["learning_rate"]) == "0.0001 to 0.01, log"


@pytest.mark.parametrize("model", ["self_mm", *json.loads(OURS.read_text("utf-8"))["models"]])
def test_the_spaces_are_upstreams_and_every_value_of_them_is_allowed(model):
    space = make_space(make_plan(model, DATASETS.get(model, "mosi")))
    published = UPSTREAM[model]["debugParams"]
    wanted = {}
    for key in set(published["d_paras"]) - LEFT_OUT.get(model, set()):
        values = published[key]
        entries = {f".{entry}": of for entry, of in values.items()} if isinstance(values, dict) else {"": values}
        wanted |= {OUR_NAME.get(key, key) + entry: set(map(str, of)) for entry, of in entries.items()}
    ours = {key: {str(-1.0 if value is None else value) for value in of.values} for key, of in space.items()}
    extra = OURS_TOO if model in ("misa", "bert_mag") else set()
    assert {key: values for key, values in ours.items() if key not in extra} == wanted
