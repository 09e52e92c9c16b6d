"""Run folders, configs, checkpoints and encoders of other people: broken, or made to harm; and what is shown of them.

The pickles of feature files are in `test_hostile_pickles.py`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import InputError, load_run
from registry.checkpoints import _read_weights
from registry.cli.screen import _Screen
from registry.comparison import collect
from registry.config import _read_file
from registry.data import cache, feature_file
from registry.data.mapped import write_mapped
from registry.data.text import TextEncoder, find_text_encoder
from registry.errors import printable
from registry.forms import render
from registry.jobs import make_plan
from registry.plugins import Plugins
from registry.runs import fault_of
from selfmm_plugin.upstream import translate
from tests.fuzz.__main__ import checked
from tests.fuzz.targets import TARGETS, explore, finished_runs
from tests.helpers import TINY_BERT, tiny_encoder
from tests.helpers import feature_file as write_feature_file

ran: list[str] = []


def run_code() -> None:
    """What an attacker would call."""
    ran.append("code")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Path]:
    """Two seeds of a run."""
    return finished_runs(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run folder, to be changed, beside a whole one."""
    shutil.copytree(trained[0].parent, tmp_path / "config")
    return tmp_path / "config" / "1112"


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; `data__metrics` is a key in a key."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# --- run folders

SETTINGS = [
    {"model": "../../x"}, {"model": ["self_mm"]}, {"model": "self_mm+"}, {"model": "x\x1b[2J"}, {"dataset": "a/b"},
    {"dataset": None}, {"seed": "1"}, {"seed": -1}, {"seed": 1.5}, {"seed": True}, {"seed": 10**30},
    {"hooks": ["ulgm"]},
    {"config": []}, {"config__x": float("nan")}, {"config__x": nested(200)}, {"data": "x"}, {"data__metrics": "other"},
    {"data__sha256": 5}, {"data__label_range": "3"}, {"data__label_range": float("inf")}, {"data__label_range": 0},
    {"data__n_train": -1}, {"data__n_train": 10**12}, {"data__max_lengths": {"audio": 10**9}},
    {"text_encoder": 3}, {"text_encoder__name": None}, {"text_encoder__config": "x"},
]  # fmt: skip
SUMMARIES = [
    {"artifacts": ["../../../etc/passwd"]}, {"artifacts": ["/etc/passwd"]}, {"artifacts": [[]]}, {"artifacts": [3]},
    {"artifacts": ["x" * 5000]}, {"artifacts": ["a\0b"]}, {"artifacts": ["a\n"]}, {"artifacts": {}},
    {"best_epoch": "1"}, {"best_epoch": 0}, {"best_epoch": 1.5}, {"metrics": {"Corr": 1.0}}, {"metrics__MAE": "1"},
    {"metrics__MAE": 10**400},
    {"metrics__MAE": float("inf")}, {"metrics": {"MAE": 1, "\x1b[2J": 1}}, {"metrics": {"MAE": 1, "<b>": 1}},
    {"protocol": {"data": 1}}, {"protocol": []}, {"parameters": -1}, {"parameters": 10**30},
    {"lines": {"history": "x"}},
]  # fmt: skip
ENVIRONMENTS = [{"threads": "two"}, {"device": ["cpu"]}, {"sources": [1]}]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("config.json", values) for values in SETTINGS),
        *(("metrics.json", values) for values in SUMMARIES),
        *(("environment.json", values) for values in ENVIRONMENTS),
    ],
)
def test_a_run_whose_json_is_of_other_types_is_none(run, name, values):
    change(run / name, **values)
    fault = fault_of(run)
    assert fault is not None
    assert fault.startswith(f"{name} is broken (")
    assert len(fault) < 400
    assert fault == printable(fault)
    with pytest.raises(InputError, match=re.escape(name)):
        load_run(run)
    comparison = collect([run.parent])  # the whole one beside it
    assert fault in comparison.rows[0].note


@pytest.mark.parametrize(
    "content", [b"\xff", b"[" * 1_000_000, b'{"a":' * 100_000, b'"' + b"x" * 10**6, b"1" * 10**6, b"1e999"]
)
def test_json_that_is_none(run, content):
    for name in ("config.json", "metrics.json", "environment.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        assert (fault_of(run) or "").startswith(f"{name} is broken (")
        (run / name).write_bytes(before)


def test_a_huge_file_in_the_place_of_json_is_not_read(run):
    os.truncate(run / "metrics.json", 1 << 40)
    assert fault_of(run) == "metrics.json is broken (it is larger than 16 MB)"


def test_a_header_of_2_to_the_63(run):
    weights = run / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 1 << 63) + weights.read_bytes()[8:])
    assert fault_of(run) == "model.safetensors is missing or broken"


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "model.safetensors", "predictions.csv", "labels.csv"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_what_is_no_file_is_missing(run, name, kind):
    path = run / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    assert fault_of(run) == f"{name} is missing"


def test_a_link_to_a_file_is_read_as_it(run, tmp_path):
    shutil.move(run / "model.safetensors", tmp_path / "elsewhere")
    (run / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert load_run(run).model is not None


@pytest.mark.parametrize("name", ["../1111/predictions", "/etc/passwd", "..", "", "a\0b", "x" * 5000, "predictions/"])
def test_a_table_is_of_its_run(run, name):
    with pytest.raises(InputError, match="has no table"):
        load_run(run).table(name)


def test_a_log_of_a_failed_seed_may_be_anything(run):
    os.mkfifo(run.parent / "7.failed.log")
    (run.parent / "8.failed.log").write_bytes(b"\x1b[2J\xff" * 100_000)
    (row,) = collect([run.parent]).rows
    assert len(row.note) < 10_000
    assert list(row.failed) == [8]


TABLES = {
    "no ids": ("predictions", lambda table: table.drop(columns="id")),
    "no predictions": ("predictions", lambda table: table.drop(columns="prediction")),
    "words": ("predictions", lambda table: table.assign(prediction="x")),
    "not finite": ("predictions", lambda table: table.assign(prediction=np.inf)),
    "no times": ("history", lambda table: table.drop(columns="train_seconds")),
    "times that are words": ("history", lambda table: table.assign(train_seconds="=1+1")),
    "half epochs": ("labels", lambda table: table.assign(epoch=table["epoch"] + 0.5)),
    "other epochs": ("labels", lambda table: table.assign(epoch=99)),
    "labels that are words": ("labels", lambda table: table.assign(text="x")),
    "labels that are not finite": ("labels", lambda table: table.assign(text=1e300)),
    "no modality": ("labels", lambda table: table[["epoch", "id"]]),
    "many modalities": ("labels", lambda table: table.assign(**{f"m{n}": 0.0 for n in range(50)})),
    "a clip twice": ("labels", lambda table: table.assign(id="a")),
    "epochs that are words": ("label_movement", lambda table: table.assign(epoch="x")),
    "very many columns": ("history", lambda table: pd.DataFrame([range(20_000)] * len(table))),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_no_run_writes(run, case):
    name, made = TABLES[case]
    table = load_run(run).table(name)
    made(table).to_csv(run / f"{name}.csv", index=False)
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        explore(run)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("content", ["id,label\na,1\n", "id,label,prediction\n", 'id,label,prediction\n"a,1,2\n'])
def test_a_run_whose_predictions_are_none_is_named_beside_the_others(run, content):
    (run / "predictions.csv").write_text(content)
    change(run / "metrics.json", lines={})
    (row,) = collect([run.parent]).rows
    assert row.seeds == [1111]
    assert str(run) in row.note


def test_a_modality_whose_name_is_mathematics_is_drawn(run):
    table = load_run(run).table("labels").rename(columns={"text": "$\\frac$"})
    table.to_csv(run / "labels.csv", index=False)
    explore(run, figure=True)


def test_settings_of_layers_that_no_memory_holds(run):
    change(run / "config.json", config__post_fusion_dim=10**6, config__post_text_dim=10**6)
    with pytest.raises(InputError, match=r"cannot be made again: RuntimeError: .*size mismatch"):
        _ = load_run(run).model
    change(run / "config.json", text_encoder__config={**TINY_BERT, "vocab_size": 10**10})
    with pytest.raises(InputError, match=r"cannot be made again: RuntimeError: .*size mismatch"):
        _ = load_run(run).model


# --- what is shown

HARM = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\\input{/etc/passwd}\\write18{ls}",
    "$x$ % \\\\",
]
HARM += ["a | b\n| c | d |", "=cmd|'/c calc'!A1", "[x](javascript:alert(1))", "\x1b]0;title\x07\x1b[2J\x9b2J\r\u202e"]


@pytest.fixture(scope="module")
def shown(trained, tmp_path_factory) -> Path:
    """Runs that say harmful things wherever text is theirs to choose."""
    folder = tmp_path_factory.mktemp("shown") / "config"
    shutil.copytree(trained[0].parent, folder)
    for seed in ("1111", "1112"):
        said = {f"{text} key": text for text in HARM} | {"text encoder": "".join(HARM), "tuned for": HARM[5]}
        change(folder / seed / "metrics.json", protocol={**said, "data": HARM[0]})
        change(folder / seed / "environment.json", device=HARM[0])
    (folder / "3.failed.log").write_text("".join(HARM))
    return folder


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("form", ["markdown", "latex", "html", "csv", "json"])
def test_no_form_holds_control_characters(shown, form):
    text = render(collect([shown]), form)
    assert printable(text) == text
    assert "title" in text


def test_html_has_our_tags_only(shown):
    page = Tags(render(collect([shown]), "html"))
    tables = {"div", "table", "thead", "tbody", "tr", "th", "td", "b", "small"}
    assert page.tags <= {"html", "meta", "title", "style", "h1", "h2", "ul", "li"} | tables
    assert page.attributes <= {"lang", "charset", "class", "tabindex", "role", "aria-label", "dir"}


def test_markdown_has_no_tags_no_links_and_whole_rows(shown):
    text = render(collect([shown]), "markdown")
    assert "<" not in text
    assert "[x](" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_latex_has_our_commands_only(shown):
    text = render(collect([shown]), "latex")
    ours = "begin caption label smallskip centering scriptsize setlength tabcolsep toprule midrule bottomrule end par"
    ours += " medskip raggedright textbf tiny pm textbackslash textasciitilde textasciicircum textbar ge le surd dagger"
    ours += " ldots usepackage linewidth"
    assert set(re.findall(r"\\([A-Za-z]+)", text)) <= set(ours.split())
    assert not re.search(r"(?<!\\)\^\^", text)


def test_csv_holds_no_formula(shown):
    table = pd.read_csv(io.StringIO(render(collect([shown]), "csv")), dtype=str)
    cells = [cell for column in table for cell in table[column].dropna()]
    assert f"'{HARM[5]}" in cells
    assert not [cell for cell in cells if cell[0] in "=+@"]


def test_the_terminal_is_sent_no_control_character(shown, benchmark):
    code, out, err = benchmark("table", shown)
    assert code == 1  # of the seed that failed
    for text in (out, err):
        assert printable(text) == text
    assert r"\x1b]0;title\x07" in out


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "\x9b31m", "\x07", "\u202etxt"])
def test_a_screen_shows_control_characters(text):
    file = io.StringIO()
    screen = _Screen(file=file, force_terminal=True, width=80)
    screen.print(text, highlight=False)
    assert text not in file.getvalue()
    assert text.encode("unicode_escape").decode() in file.getvalue()


def test_ids_stay_as_they_are_in_the_files_that_are_read_back(run, tmp_path):
    table = load_run(run).table("predictions").assign(id=["=1+1", "@x", "-1", "+a"])
    table.to_csv(run / "predictions.csv", index=False)
    assert load_run(run).predictions["id"].tolist() == ["=1+1", "@x", "-1", "+a"]


# --- what is kept of feature files


def test_what_is_kept_in_a_form_of_its_own_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    path = write_feature_file(tmp_path)
    first = feature_file.read_feature_file(path, label_range=3.0, cache=tmp_path)
    (place,) = tmp_path.glob("features-*.safetensors")
    key = cache.Cache(tmp_path, path, variant="3.0", version=feature_file.FORMAT)._key(first.sha256)
    content: dict[str, Any] = {
        "aligned": False,
        "notes": [],
        "splits": {name: vars(first.splits[name]) for name in first.splits},
    }
    splits = content["splits"]
    forms = [
        {},
        {**content, "aligned": 3},
        {**content, "notes": [3]},
        {**content, "splits": {"train": splits["train"]}},
    ]
    wrong = ({"audio": np.zeros(3, np.float32)}, {"more": 1}, {"labels": {}}, {"ids": "train"}, {"ids": []})
    wrong += ({"text_bert": np.zeros((8, 2, 9), np.int64)}, {"audio_lengths": np.full(8, 7)})
    wrong += ({"audio_lengths": np.zeros(8, np.int64)}, {"vision": None})
    forms += [{**content, "splits": {**splits, "train": {**splits["train"], **change}}} for change in wrong]
    for form in forms:
        write_mapped(place, form, key)
        again = feature_file.read_feature_file(path, label_range=3.0, cache=tmp_path)
        np.testing.assert_equal(again.splits["train"].audio, first.splits["train"].audio)
        assert again.splits["train"].ids == first.splits["train"].ids


# --- config files

CONFIGS = {
    "dotted.toml": "a." * 400_000 + "a = 1",
    "dotted lines.toml": "\n".join("a." * 400 + f"b{n} = 1" for n in range(1000)),
    "lists.toml": "a = " + "[" * 400_000,
    "tables.toml": "a = " + "{a = " * 200_000,
    "keys.toml": "".join(f"key{n} = 1\n" for n in range(80_000)),
    "deep.json": "[" * 1_000_000,
    "deep tables.json": '{"hook":' * 400 + "1" + "}" * 400,
    "deep value.json": '{"batch_size":' + "[" * 900 + "]" * 900 + "}",
    "many keys.json": json.dumps({f"key{n}": 1 for n in range(60_000)}),
    "like keys.json": json.dumps({f"batch_siz{n}": 1 for n in range(999)}),
    "long key.json": json.dumps({"k" * 900_000: 1}),
    "long value.json": json.dumps({"batch_size": "1," * 400_000}),
    "long preset.json": json.dumps({"preset": "k" * 900_000, "config": {}}),
    "other model.json": json.dumps({"model": "k" * 900_000, "config": {}}),
    "twice.json": '{"' + "x" * 400_000 + '": 1, "' + "x" * 400_000 + '": 2}',
    "large.json": '{"a": "' + "x" * 2_000_000 + '"}',
    "number.json": '{"batch_size": ' + "1" * 900_000 + "}",
    "control.json": json.dumps({"\x1b[2J": "\x1b[2J"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_a_bomb_is_refused_soon(tmp_path, name):
    path = tmp_path / name
    path.write_text(CONFIGS[name])
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        make_plan("self_mm", "mosi", config_file=path)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 3000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"batch_size": 8, "hook": {"distance": "l2"}}', 'batch_size = 8\n[hook]\ndistance = "l2"\n']
)
def test_every_length_of_a_config_is_read_or_refused(tmp_path, text):
    path = tmp_path / ("x.json" if text[0] == "{" else "x.toml")
    spec = Plugins().load("model", "self_mm")
    for length in range(len(text)):
        for flipped in (text[:length], text[:length] + chr(ord(text[length]) ^ 1) + text[length + 1 :]):
            path.write_text(flipped)
            try:
                assert isinstance(_read_file(path, spec)[0], dict)
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017


# --- checkpoints


def refused(path: Path, content: bytes, message: str = r"as a checkpoint of weights|is not a state dict") -> None:
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        _read_weights(path)
    assert time.process_time() - started < 5
    assert "\n" not in str(caught.value)


def archive(pickled: bytes, kind: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """A file as torch.save writes it, of a pickle and storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as made:
        made.writestr("x/data.pkl", pickled)
        made.writestr("x/version", b"3\n")
        for name, content in members.items():
            made.writestr(f"x/data/{name}", content)
    return file.getvalue()


def legacy(pickled: bytes) -> bytes:
    """A file as torch.save wrote it before 1.6."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + pickled + pickle.dumps([], protocol=2)


def storage(key: bytes) -> bytes:
    return b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + key + b"X\x03\x00\x00\x00cpuK\x01tQ"


COLLIDING = b"".join(b"\x8a\x0b" + (n * sys.hash_info.modulus).to_bytes(11, "little") + b"Ns" for n in range(1, 50_000))
STATES = {
    "code": b"\x80\x02c" + f"{__name__}\nrun_code\n".encode() + b")R.",
    "code of torch": b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01x\x85R.",
    "a key of very many tuples": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "keys that collide": b"\x80\x02}" + COLLIDING + b".",
    "a storage called by tuples": b"\x80\x02" + storage(b")" + b"\x85" * 300_000) + b".",
    "a memo of 64 GB": b"\x80\x02]r\xff\xff\xff\xff.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("form", [archive, legacy, bytes])
def test_a_checkpoint_that_is_more_than_weights(tmp_path, name, form):
    ran.clear()
    refused(tmp_path / "x.pth", form(STATES[name]))
    assert ran == []


def test_the_code_in_a_checkpoint_is_live():
    ran.clear()
    pickle.loads(STATES["code"])
    assert ran == ["code"]


def test_a_packed_checkpoint(tmp_path):
    state = b"\x80\x02}." + b"N" * 10
    refused(tmp_path / "x.pth", archive(state, zipfile.ZIP_DEFLATED, **{"0": bytes(300_000_000)}))
    refused(tmp_path / "x.pth", archive(state + bytes(300_000_000), zipfile.ZIP_DEFLATED))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,)),
        lambda: torch.zeros(10**12, 0),
        lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        lambda: np.zeros(3),
    ],
)
def test_tensors_that_are_larger_than_their_file_or_none(tmp_path, tensor):
    torch.save({"x": tensor()}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"checkpoint of weights|is not a state dict"):
        _read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("new", [True, False])
def test_whole_checkpoints_are_read_and_every_length_and_flipped_byte_too_or_refused(tmp_path, new):
    path = tmp_path / "x.pth"
    module = torch.nn.Linear(2, 1)
    state = {**module.state_dict(), "half": torch.zeros(1).half(), "b": torch.zeros(1, dtype=torch.bool)}
    for saved in (state, module.state_dict(), {"p": torch.nn.Parameter(torch.zeros(2)), "i": torch.arange(3)}):
        torch.save(saved, path, _use_new_zipfile_serialization=new)
        assert _read_weights(path).keys() == saved.keys()
    content = path.read_bytes()
    for length in range(0, len(content), 3):
        changed = bytearray(content)
        changed[length] ^= 16
        for damaged in (content[:length], changed):
            path.write_bytes(damaged)
            try:
                _read_weights(path)
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_a_head_that_claims_a_width_it_has_not():
    state = {
        f"post_{task}_layer_{n}.weight": torch.zeros(2, 2)
        for task in ("fusion", "text", "audio", "video")
        for n in (1, 2)
    }
    for name in ("audio", "video"):
        state |= {
            f"{name}_model.rnn.weight_ih_l0": torch.zeros(4, 1),
            f"{name}_model.rnn.weight_hh_l0": torch.zeros(4, 1),
        }
        state[f"{name}_model.linear_1.weight"] = torch.zeros(2, 1)
    state["text_model.model.embeddings.word_embeddings.weight"] = torch.zeros(2, 2)
    assert translate(state).config["post_text_dim"] == 2
    state["post_text_layer_1.weight"] = torch.zeros(10**5, 1)
    with pytest.raises(InputError, match="the head of text does not fit itself"):
        translate(state)


# --- text encoders


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", {"text_config": "someone/kernel@main:x"}])
def test_an_encoder_that_asks_for_code_from_the_hub(tmp_path, key, value):
    folder = tiny_encoder(tmp_path / "encoder")
    change(folder / "config.json", **{key: value})
    with pytest.raises(InputError, match="asks for code from the hub"):
        find_text_encoder(str(folder))
    with pytest.raises(InputError, match="asks for code from the hub"):
        TextEncoder.from_config({**TINY_BERT, key: value}).build()


@pytest.mark.parametrize("kernel", [{"x": {}, "": "org/kern"}, {"x": "}", "y": "org/kern"}, "org/kern"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_kernels_from_the_hub_are_refused_however_they_are_nested(tmp_path, key, kernel):
    folder = tiny_encoder(tmp_path / "encoder")
    change(folder / "config.json", **{key: kernel})
    with pytest.raises(InputError, match="asks for code from the hub"):
        find_text_encoder(str(folder))


def test_code_in_an_encoders_weights_never_runs(tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    for form in (archive, legacy, bytes):
        ran.clear()
        (folder / "pytorch_model.bin").write_bytes(form(STATES["code"]))
        with pytest.raises(InputError, match="its weights cannot be loaded"):
            find_text_encoder(str(folder)).build()
        assert ran == []


def test_code_beside_an_encoder_never_runs(tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    (folder / "evil.py").write_text(f"import {__name__} as host\nhost.run_code()\nclass Evil: ...\n")
    maps = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    change(folder / "config.json", auto_map=maps)
    change(folder / "tokenizer_config.json", auto_map=maps)
    ran.clear()
    encoder = find_text_encoder(str(folder))
    assert encoder.build() is not None
    change(folder / "config.json", model_type="evil")
    with pytest.raises(InputError, match="cannot be loaded"):
        find_text_encoder(str(folder))
    assert ran == []


def test_an_encoder_that_reads_no_token(tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    change(folder / "config.json", max_position_embeddings=-1)
    with pytest.raises(InputError, match="cannot be loaded"):
        find_text_encoder(str(folder))


# --- fuzzing


@pytest.mark.parametrize("name", ["pickle", "opcodes", "values", "cache", "config", "settings", "checkpoint"])
def test_a_target_of_fuzzing_works(tmp_path, monkeypatch, name):
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    read, drawn = TARGETS[name](tmp_path)

    @settings(max_examples=5, deadline=None, database=None)
    @given(st.sampled_from(drawn) if isinstance(drawn, list) else drawn)
    def one(drawn):
        checked(read, drawn)

    one()
