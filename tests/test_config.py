"""Configurations: layers, spellings, files, faults, and that every key is read by something."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import Field, model_validator

from registry import contract
from registry.config import as_typed, config_class, describe, parse_settings, resolve
from registry.contract import Config, DatasetSpec, HookSpec, ModelSpec, Training
from registry.data.catalog import DEMO, MOSEI, MOSI, SIMS, SIMSV2
from registry.errors import InputError
from registry.plugins import Plugins
from selfmm_plugin.network import SelfMM
from selfmm_plugin.plugin import SELF_MM, ULGM
from selfmm_plugin.supervision import UlgmConfig

PARTS = ("distance", "membership", "centers", "center_decay", "relative", "bound", "weighting")
HOOK_KEYS = {f"hook.{part}" for part in PARTS}
"""The keys of the hook `ulgm` that those of `self_mm` do not settle."""


def settle(dataset: DatasetSpec = MOSI, spec: ModelSpec = SELF_MM, **options):
    return resolve(spec, [ULGM], dataset, **options)


def refusal(**options) -> str:
    with pytest.raises(InputError) as caught:
        settle(**options)
    return str(caught.value)


# --- layers


def test_class_default_preset_dataset_file_and_set_in_this_order(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"batch_size": 8, "early_stop": 3}')
    layers = {"preset": "mmsa", "defaults": {"epochs": 15, "early_stop": 4}, "file": file}
    model = settle(MOSEI, overrides={"batch_size": 9}, **layers).model
    assert (model.a_lstm_bidirectional, model.learning_rate_video) == (False, 1e-4)
    assert (model.epochs, model.early_stop, model.batch_size) == (15, 3, 9)


def test_the_first_preset_is_the_default_and_demo_uses_that_of_mosi():
    assert settle().preset == "mmsa"
    assert settle(DEMO).as_dict() == settle(MOSI).as_dict()
    assert settle(preset="author").model.batch_size == 32
    assert settle(preset="author").hooks["ulgm"].exclude_zero is False


@pytest.mark.parametrize(
    ("dataset", "preset", "message"),
    [
        (SIMSV2, "author", "preset 'author' of self_mm has no simsv2, only mosi, mosei, sims"),
        (MOSI, "authr", "unknown preset of self_mm 'authr', did you mean 'author'?"),
    ],
)
def test_presets_that_do_not_fit(dataset, preset, message):
    assert message in refusal(dataset=dataset, preset=preset)


def test_a_model_without_presets():
    spec = ModelSpec(name="plain", summary="", build=torch.nn.Module, training=Training(batch_size=7))
    assert resolve(spec, [], MOSI).model.batch_size == 7
    assert resolve(spec, [], MOSI).preset is None


def test_the_preset_mmsa_is_upstreams_published_configuration():
    folder = Path(pytest.importorskip("MMSA").__file__).parent / "config"
    published = json.loads((folder / "config_regression.json").read_text())["self_mm"]
    for dataset in (MOSI, MOSEI, SIMS):
        ours = settle(dataset).as_dict()
        theirs = published["commonParams"] | published["datasetParams"][dataset.name]
        theirs["exclude_zero"] = theirs.pop("excludeZero")
        shared = theirs.keys() & ours.keys()
        assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
        assert len(shared) == 28


# --- spellings and hooks


@pytest.mark.parametrize("key", ["H", "label_range"])
def test_label_range_reaches_the_hook_in_every_spelling(key):
    assert settle(overrides={key: 2.0}).hooks["ulgm"].label_range == 2.0


def test_the_order_of_tasks_and_modalities_means_nothing():
    one, two = {"tasks": "MTV", "modalities": "text,vision"}, {"tasks": "VMT", "modalities": "vision,text"}
    assert settle(overrides=one).as_dict() == settle(overrides=two).as_dict()


def test_keys_of_the_model_shape_its_own_hook_and_are_the_only_way_to():
    config = settle(overrides={"post_text_dim": 5, "excludeZero": False, "hook.distance": "cosine"})
    assert config.hooks["ulgm"].head_dims == {"text": 5, "audio": 16, "vision": 32}
    assert config.hooks["ulgm"].exclude_zero is False
    assert {key for key in config.as_dict() if key.startswith("hook.")} == HOOK_KEYS
    assert "unknown key 'hook.exclude_zero', did you mean 'exclude_zero'?" in refusal(
        overrides={"hook.exclude_zero": True}
    )


def test_a_borrowed_hook_has_all_its_keys():
    spec = replace(SELF_MM, hooks=(), hook_config=None)
    config = settle(spec=spec, overrides={"hook.tasks": "MT", "hook.head_dims.audio": 6})
    assert config.hooks["ulgm"].head_dims == {"text": 32, "audio": 6, "vision": 32}
    assert config.as_dict()["hook.tasks"] == "MT"


def test_what_was_changed_is_told_apart_from_preset_and_defaults():
    assert settle(defaults={"epochs": 15}).changed == {}
    assert settle(overrides={"batch_size": 16, "H": 2}).changed == {"label_range": 2.0}
    assert settle(defaults={"epochs": 15}, overrides={"epochs": 3}).changed == {"epochs": 3}


def test_a_later_layer_may_use_the_other_spelling(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("H = 2.0")
    assert settle(file=file, overrides={"label_range": 1.0}).model.label_range == 1.0
    assert "'H' and 'label_range' are two spellings of one key" in refusal(overrides={"H": 1.0, "label_range": 2.0})


# --- files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flat.json", '{"batch_size": 5, "hook.distance": "cosine"}'),
        ("nested.json", '{"batch_size": 5, "hook": {"distance": "cosine"}}'),
        ("run.json", '{"model": "self_mm", "seed": 1, "config": {"batch_size": 5, "hook.distance": "cosine"}}'),
        ("table.toml", 'batch_size = 5\n[hook]\ndistance = "cosine"'),
    ],
)
def test_files_of_every_form(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    config = settle(file=tmp_path / name)
    assert (config.model.batch_size, config.hooks["ulgm"].distance) == (5, "cosine")


def test_what_a_run_writes_is_read_again(tmp_path):
    config = settle(overrides={"modalities": "text,audio", "epochs": None, "hook.distance": "cosine"})
    (tmp_path / "config.json").write_text(json.dumps({"config": config.as_dict()}))
    assert settle(file=tmp_path / "config.json").as_dict() == config.as_dict()


def test_a_list_of_numbers_is_read_as_it_is_shown():
    class Widths(Config):
        widths: tuple[int, ...] = Field((128, 32), description="")

    spec = ModelSpec(name="wide", summary="", build=object, config=Widths)
    dataset = DatasetSpec(name="mosi", summary="", label_range=3.0)
    for given in ("64,16", "64, 16", "[64, 16]"):
        chosen = resolve(spec, [], dataset, overrides=parse_settings([f"widths={given}"]))
        assert chosen.model.widths == (64, 16)
    with pytest.raises(InputError, match=r"'widths\.1' must be an integer, got 'many'"):
        resolve(spec, [], dataset, overrides={"widths": "64,many"})


def test_a_runs_own_file_brings_its_preset(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "author", "config": settle(preset="author").as_dict()}))
    assert settle(file=file).preset == "author"
    assert settle(file=file, preset="mmsa").preset == "mmsa"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.json", None, "absent.json cannot be read: No such file"),
        ("broken.json", "{", "broken.json is not JSON"),
        ("broken.toml", "a = = 1", "broken.toml is not TOML"),
        ("list.json", "[1]", "must hold a table of keys, got a list"),
        ("run.json", '{"preset": 7, "config": {}}', "run.json: 'preset' must be text, got 7"),
        ("config.yaml", "a: 1", "must end in .json or .toml"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert message in refusal(file=tmp_path / name)


# --- faults


def test_every_fault_is_listed_at_once_with_a_suggestion():
    wrong = {"batch_sise": 4, "early_stop": 0, "tail": "stop", "hook.distanse": "l2", "hook.distance": "l3"}
    message = refusal(overrides={**wrong, "a_lstm_bidirectional": "maybe", "epochs": 1.5})
    for part in [
        "unknown key 'batch_sise', did you mean 'batch_size'?",
        "'early_stop' must be at least 1, got 0",
        "'tail' must be 'step' or 'drop', got 'stop'",
        "unknown key 'hook.distanse', did you mean 'hook.distance'?",
        "'hook.distance' must be 'l2', 'squared' or 'cosine', got 'l3'",
        "'a_lstm_bidirectional' must be true or false, got 'maybe'",
        "'epochs' must be an integer, got 1.5",
    ]:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"modalities": "text,smell"}, "'modalities' must be any of text, audio, vision, each once"),
        ({"modalities": []}, "'modalities' must be any of text, audio, vision, each once, got ()"),
        ({"modalities": 3}, "'modalities' must be a list, got 3"),
        ({"tasks": "MX", "bach_size": 3}, "'tasks' must be M and any of TAV, each once, got 'MX'"),
        ({"tasks": "TAV"}, "'tasks' must be M and any of TAV, each once, got 'TAV'"),
        ({"tasks": "MTT"}, "'tasks' must be M and any of TAV, each once, got 'MTT'"),
        ({"tasks": "MTAV", "modalities": "text"}, "'tasks' must be M and any of T, each once, got 'MTAV'"),
        ({"post_text_dropout": 1.0}, "'post_text_dropout' must be less than 1, got 1.0"),
        ({"label_range": float("nan")}, "'label_range' must be a number, got nan"),
        ({"batch_size.x": 1}, "unknown key 'batch_size.x'"),
        ({"hook": 3}, "unknown key 'hook'"),
        ({"batch_size": True}, "'batch_size' must be an integer, got True"),
    ],
)
def test_values_that_do_not_fit(overrides, message):
    assert message in refusal(overrides=overrides)


def test_hooks_that_share_a_key():
    twin = HookSpec(name="twin", summary="", build=UlgmConfig, config=UlgmConfig)
    with pytest.raises(InputError, match=r"hook 'twin' has keys of another hook: bound, center_decay, .*, weighting"):
        resolve(SELF_MM, [ULGM, twin], MOSI)


def test_a_borrowed_hook_is_not_shaped_by_the_models_keys():
    class Ranged(Config):
        """Has a key that `self_mm` derives for its own hook."""

        tasks: str = "M"

    borrowed = HookSpec(name="borrowed", summary="", build=Ranged, config=Ranged)
    spec = replace(SELF_MM, hooks=())
    assert resolve(spec, [borrowed], MOSI, overrides={"tasks": "MT"}).hooks["borrowed"].tasks == "M"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hook.head_dims": {"text": "wide"}}, "'hook.head_dims.text' must be an integer, got 'wide'"),
        ({"hook.head_dims.text": -1}, "'hook.head_dims.text' must be at least 1, got -1"),
        ({"hook.head_dropouts.text": 2}, "'hook.head_dropouts.text' must be less than 1, got 2"),
        ({"hook.head_dims": {"text": {"a": 3}}}, "'hook.head_dims.text' must be an integer, got {'a': 3}"),
        ({"hook.head_dims": 5, "hook.head_dims.text": 3}, "'hook.head_dims' must be a table, got 5"),
        ({"hook.head_dims.text": 3, "hook.head_dims": 5}, "'hook.head_dims' must be a table, got 5"),
    ],
)
def test_tables_of_a_hook_that_do_not_fit(overrides, message):
    spec = replace(SELF_MM, hooks=(), hook_config=None)
    assert message in refusal(spec=spec, overrides=overrides)


@pytest.mark.parametrize(
    ("in_file", "override"),
    [
        ("[hook.head_dims]\naudio = 8", {"hook.head_dims": {"text": 64}}),
        ('"hook.head_dims.audio" = 8', {"hook": {"head_dims": {"text": 64}}}),
        ("hook.head_dims = {audio = 8, text = 7}", {"hook.head_dims.text": 64}),
        ('"hook.head_dims.audio" = 9', {"hook.head_dims": {"text": 64, "audio": 8}}),
    ],
)
def test_a_tables_entries_are_layered_one_by_one_in_every_form(tmp_path, in_file, override):
    file = tmp_path / "c.toml"
    file.write_text(in_file)
    spec = replace(SELF_MM, hooks=(), hook_config=None)
    config = settle(spec=spec, file=file, overrides=override)
    assert config.hooks["ulgm"].head_dims == {"text": 64, "audio": 8, "vision": 32}


class Open(Config):
    """A model's config with a key that has no default, and a table."""

    width: int
    dropouts: dict[str, float] = Field({"first": 0.1, "second": 0.2})


def open_spec(**presets) -> ModelSpec:
    def hook_config(config):
        return {"head_dims": {"text": config.width}}

    return replace(SELF_MM, config=Open, presets=presets, hook_config=hook_config)


def test_a_key_without_a_default_comes_from_a_preset_or_the_user():
    spec = open_spec(own={"mosi": {"width": 7, "hook.distance": "cosine"}})
    assert settle(spec=spec).hooks["ulgm"].head_dims == {"text": 7}
    rows = {row.key: row.default for row in describe(spec, [ULGM])}
    assert rows["width"] == "must be set"
    assert "hook.head_dims" not in rows
    config = settle(spec=open_spec(), overrides={"width": 9})
    assert config.hooks["ulgm"].head_dims == {"text": 9}
    assert config.changed == {"width": 9}
    assert refusal(spec=open_spec()).endswith("'width' has no default and must be set")


def test_what_is_required_may_fit_only_what_else_is_given():
    class Fitting(Config):
        heads: int
        width: int = Field(8)

        @model_validator(mode="after")
        def _divides(self):
            if self.width % self.heads:
                raise ValueError("heads must divide width")
            return self

    spec = replace(SELF_MM, config=Fitting, presets={}, hooks=(), hook_config=None)
    changed = settle(spec=spec, overrides={"heads": 3, "width": 9}).changed
    assert (changed["heads"], changed["width"]) == (3, 9)
    assert settle(spec=spec, overrides={"heads": 4}).changed == {"heads": 4}


def test_derived_keys_may_depend_on_the_config():
    class Choosing(Config):
        fixed: bool = True

    spec = replace(
        SELF_MM, config=Choosing, presets={}, hook_config=lambda c: {"distance": "cosine"} if c.fixed else {}
    )
    assert settle(spec=spec).hooks["ulgm"].distance == "cosine"
    config = settle(spec=spec, overrides={"fixed": False, "hook.distance": "squared"})
    assert config.hooks["ulgm"].distance == config.changed["hook.distance"] == "squared"


def test_tables_that_cannot_be_spread_are_given_whole():
    class Tabled(Config):
        by_layer: dict[int, float] = Field({1: 0.1})
        needed: dict[str, int]

    spec = replace(SELF_MM, config=Tabled, presets={}, hooks=(), hook_config=None)
    config = settle(spec=spec, overrides={"by_layer": {2: 0.5}, "needed": {}}).model
    assert (config.by_layer, config.needed) == ({2: 0.5}, {})


def test_a_models_own_table_is_layered_likewise():
    config = settle(spec=open_spec(), overrides={"width": 9, "dropouts.second": 0.5, "dropouts": {"first": 0.3}})
    assert config.model.dropouts == {"first": 0.3, "second": 0.5}


def test_a_key_of_a_hook_that_has_none():
    bare = HookSpec(name="bare", summary="", build=UlgmConfig)
    spec = replace(SELF_MM, hooks=(), hook_config=None)
    with pytest.raises(InputError, match=r"unknown key 'hook\.x'"):
        resolve(spec, [bare], MOSI, overrides={"hook.x": 1})


def test_hook_keys_without_a_hook():
    with pytest.raises(InputError, match=r"'hook\.distance' is the key of a hook, and there is none"):
        resolve(SELF_MM, [], MOSI, overrides={"hook.distance": "l2"})


# --- settings of the command line


def test_settings_are_json_or_python_words_or_text():
    given = ["a=1", "b=1e-3", "c=true", "d=None", 'e=[1, "x"]', "f=text,audio", "g=", "h=x=y", " i = False "]
    expected = {"a": 1, "b": 1e-3, "c": True, "d": None, "e": [1, "x"], "f": "text,audio", "g": "", "h": "x=y"}
    assert parse_settings(given) == {**expected, "i": False}


@pytest.mark.parametrize(
    ("given", "message"), [(["a"], "KEY=VALUE, got 'a'"), (["=1"], "KEY=VALUE"), (["a=1"] * 2, "twice")]
)
def test_settings_that_are_wrong(given, message):
    with pytest.raises(InputError, match=message):
        parse_settings(given)


# --- describing


def test_describe_tells_every_key_its_type_default_and_presets():
    rows = {row.key: row for row in describe(SELF_MM, [ULGM])}
    assert rows.keys() == {*config_class(SELF_MM).model_fields, *HOOK_KEYS}
    plain = {row.key for row in describe(replace(SELF_MM, hooks=()), [ULGM])}
    assert plain >= {f"hook.{key}" for key in UlgmConfig.model_fields}
    assert all(row.meaning and row.type for row in rows.values())
    batch_size = rows["batch_size"]
    assert (batch_size.type, batch_size.default, batch_size.presets["mmsa"]["mosei"]) == ("integer", 16, 32)
    assert (rows["epochs"].type, rows["hook.distance"].type) == ("integer or none", "l2|squared|cosine")
    assert "(also H)" in rows["label_range"].meaning


# --- every key does something


def test_every_key_is_read_by_something(tmp_path, encoder, monkeypatch):
    """The config objects note which of their fields are asked for during one whole run."""
    import registry
    from tests.helpers import feature_file

    read: set[str] = set()

    def recording(cls, prefix):
        class Recorded(cls):
            def __getattribute__(self, name):
                if name in cls.model_fields:
                    read.add(prefix + name)
                return super().__getattribute__(name)

        return Recorded

    whole = recording(config_class(SELF_MM), "")
    monkeypatch.setattr("registry.config.config_class", lambda spec: whole)
    hook = contract.HookSpec(**{**vars(ULGM), "config": recording(UlgmConfig, "hook.")})
    load = Plugins.load
    monkeypatch.setattr(Plugins, "load", lambda self, kind, name: hook if kind == "hook" else load(self, kind, name))
    registry.run(
        "self_mm",
        "custom",
        data=feature_file(tmp_path),
        text_encoder=encoder,
        label_range=3.0,
        runs=tmp_path / "runs",
        config={"epochs": 1, "scheduler": "plateau"},
    )
    assert read == {*config_class(SELF_MM).model_fields, *(f"hook.{key}" for key in UlgmConfig.model_fields)}


@pytest.mark.parametrize("key", sorted(set(SELF_MM.config.model_fields) - {"modalities", "tasks", "supervision"}))
def test_every_key_of_self_mm_changes_the_network_its_groups_or_the_hook(key, encoder):
    """Reading is not using: another value must lead to another model, optimiser or hook."""
    from tests.test_network import info

    others = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 0.5 + 0.25, type(None): lambda v: 1.5}

    def built(**overrides) -> str:
        config = settle(overrides={"a_lstm_layers": 2, "v_lstm_layers": 2, **overrides})
        model = SelfMM(config.model, info())
        rates = [(g["lr"], g["weight_decay"], len(g["params"])) for g in model.parameter_groups(config.model)]
        return f"{model} {rates} {config.hooks['ulgm'].model_dump()}"

    before = getattr(settle(overrides={"a_lstm_layers": 2, "v_lstm_layers": 2}).model, key)
    assert built(**{key: others[type(before)](before)}) != built()


def test_the_word_none_of_a_choice():
    assert settle(overrides=parse_settings(["scheduler=none"])).model.scheduler == "none"
    assert settle(overrides=parse_settings(["clip_value=none"])).model.clip_value is None


def test_a_key_that_stands_twice_in_a_file(tmp_path):
    (tmp_path / "twice.json").write_text('{"batch_size": 8, "batch_size": 4}')
    assert "'batch_size' stands in it twice" in refusal(file=tmp_path / "twice.json")


def test_another_models_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "tfn+ulgm", "preset": "x", "config": {}}')
    assert "is of a run of tfn+ulgm, not of self_mm" in refusal(file=tmp_path / "config.json")


def test_an_empty_preset_is_none_that_is_known():
    assert "unknown preset of self_mm ''" in refusal(preset="")


@pytest.mark.parametrize("key", ["hook.tasks", "hook.head_dims.text"])
def test_keys_that_follow_from_the_models_own(key):
    refused = refusal(overrides={key: "MT"})
    assert "follows from the model's own keys" in refused or "did you mean 'tasks'" in refused


@pytest.mark.parametrize("value", [True, None, 0.005, 1e-5, "x", ("a", "b"), {"a": 1}])
def test_values_as_they_are_typed(value):
    expected = {True: "true", None: "none", 0.005: "0.005", 1e-5: "1e-05", "x": "x", ("a", "b"): "a,b"}
    assert as_typed(value) == ("a 1" if isinstance(value, dict) else expected[value])
