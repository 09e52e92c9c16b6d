"""Runs that go to the hub and come back, with the hub's own client and a small hub on this machine."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

import registry
from registry import InputError, Run, load_run, pull, push
from registry.hub import _without_paths
from registry.labels import find_runs
from tests.helpers import tiny_encoder
from tests.test_prediction import make_file, trained

REPO = "ann/self-mm"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """As much of the hub as its client asks for: repositories of plain files; those that write need the token `ann`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, status: int, content: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.asked.append(f"{self.command} {self.path}")
                is_ann = self.headers.get("Authorization") == "Bearer ann"
                status, found = hub.respond(self.command, self.path.partition("?")[0], body, is_ann)
                if isinstance(found, bytes):
                    self.answer(status, found, ETag=f'"{len(found)}"', X_Repo_Commit=SHA)
                else:
                    code = {"X_Error_Code": "RepoNotFound"} if status == 404 else {}
                    self.answer(status, json.dumps(found).encode(), Content_Type="application/json", **code)

            do_GET = do_HEAD = do_POST = handle_request  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def respond(self, method: str, path: str, body: bytes, is_ann: bool) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if method == "POST" and not is_ann:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            if repo in self.repos:
                return 409, {"url": f"{self.url}/{repo}", "error": "exists"}
            self.repos[repo], self.private[repo] = (
                {},
                bool(asked.get("private") or asked.get("visibility") == "private"),
            )
            return 200, {"url": f"{self.url}/{repo}", "name": repo}
        api = re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/(\w+)/\w+(.*))?", path)
        file = re.fullmatch(r"/(\w+/[\w-]+)/resolve/\w+/(.+)", path)
        files = self.repos.get((api or file)[1]) if api or file else None  # type: ignore[index]
        if files is None:
            return 404, {"error": "Repository not found"}
        if file:
            return (200, files[file[2]]) if file[2] in files else (404, {"error": "Entry not found"})
        if api[2] == "preupload":
            wanted = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        if api[2] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{api[1]}/commit/{SHA}", "commitOid": SHA, "success": True}
        if api[2] == "tree":
            return 200, [{"type": "file", "path": n, "size": len(c), "oid": SHA} for n, c in files.items()]
        return 200, {"id": api[1], "sha": SHA, "siblings": [{"rfilename": name} for name in files]}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    made = Hub()
    thread = Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    aim(monkeypatch, made.url, tmp_path / "cache")
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def aim(monkeypatch, url: str, cache: Path, token: str = "ann") -> None:
    """Let the hub's client ask another hub than the public one."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Run, Path]:
    """A run whose text encoder lies in a folder of this machine."""
    folder = tmp_path_factory.mktemp("secret_place")
    data = make_file(folder)
    return trained("self_mm", data, str(tiny_encoder(folder / "enc")), folder, standardize=True), data


# --- there and back


def test_a_run_comes_back_and_predicts_the_same(hub, run, tmp_path):
    found, data = run
    assert push(found, REPO) == f"{hub.url}/{REPO}"
    back = pull(REPO, tmp_path / "pulled")
    assert back.metrics == pytest.approx(found.metrics, nan_ok=True)
    encoder = found.settings["text_encoder"]["name"]
    ours, theirs = (registry.predict(r, data, text_encoder=encoder) for r in (found, back))
    pd.testing.assert_frame_equal(ours, theirs)
    assert {"text", "audio", "vision"} <= set(theirs)
    assert {file.name for file in back.folder.iterdir()} == {
        "config.json", "environment.json", "metrics.json", "model.safetensors", "history.csv",
    }  # fmt: skip
    with pytest.raises(InputError, match="has no table 'predictions'"):
        _ = back.predictions


def test_load_run_and_the_commands_take_the_hubs_name(hub, run, benchmark, empty_folder):
    found, data = run
    push(found, REPO)
    assert load_run(f"hub:{REPO}").metrics == pytest.approx(found.metrics, nan_ok=True)
    assert find_runs(f"hub:{REPO}@main")[0].settings["seed"] == 1111
    encoder = found.settings["text_encoder"]["name"]
    code, out, _ = benchmark("predict", f"hub:{REPO}", data, "--text-encoder", encoder, "--device", "cpu")
    assert (code, "test$_$3" in out) == (0, True)


def test_without_a_network_the_local_copy_serves(hub, run, monkeypatch, tmp_path):
    push(run[0], REPO)
    pull(REPO)
    aim(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert load_run(f"hub:{REPO}").settings["model"] == "self_mm"


# --- what is sent


def test_nothing_of_single_clips_and_no_path_is_sent(hub, run):
    found, _ = run
    push(found, REPO)
    files = hub.repos[REPO]
    assert set(files) - {".gitattributes"} == {
        "README.md", "config.json", "environment.json", "history.csv", "metrics.json", "model.safetensors",
    }  # fmt: skip
    for name, content in files.items():
        for secret in (b"secret_place", b"train$_$", b"test$_$", b"/tmp"):
            assert secret not in content, name
    assert json.loads(files["config.json"])["text_encoder"]["name"] == "enc"
    assert json.loads(files["metrics.json"])["protocol"]["text encoder"] == "enc, fine-tuned"
    labels = found.table("labels").query("epoch == 1")["fusion"].to_numpy(np.float32)
    sent = hub_weights(files, found.folder)
    assert not [
        name for name, values in sent.items() if len(values.shape) and len(values) == len(labels) and "hook" in name
    ]
    assert "hook.ulgm.supervision.heads.text.layer_1.weight" in sent


def hub_weights(files: dict[str, bytes], beside: Path) -> dict[str, np.ndarray]:
    place = beside.parent / "sent.safetensors"
    place.write_bytes(files["model.safetensors"])
    try:
        return load_file(place)
    finally:
        place.unlink()


def test_predictions_where_they_are_asked_for(hub, run):
    push(run[0], REPO, with_predictions=True)
    pd.testing.assert_frame_equal(load_run(f"hub:{REPO}").predictions, run[0].predictions)


def test_the_card_says_how_good_it_is_and_how_to_use_it(hub, run):
    push(run[0], REPO, private=True)
    assert hub.private[REPO]
    card = hub.repos[REPO]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: selfmm-plugin")
    assert f"| MAE | {run[0].metrics['MAE']:.4f} |" in card
    assert f'registry.load_run("hub:{REPO}")' in card
    assert "audio of width 5" in card
    assert "AAAI 2021" in card


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/enc", "enc"),
        ("/home/ann/enc, frozen", "enc, frozen"),
        ("~/enc/", "enc"),
        (r"C:\Users\ann\enc", "enc"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("google/bert", "google/bert"),
        ("none", "none"),
    ],
)
def test_paths(text, expected):
    assert _without_paths({"a": [text, 3]}, text.removesuffix(", frozen")) == {"a": [expected, 3]}


# --- what goes wrong


@pytest.mark.parametrize("repo", ["self-mm", "ann/self mm", "https://huggingface.co/ann/x", "../x/y", "ann/x/y", ""])
def test_names_that_are_none(repo):
    with pytest.raises(InputError, match="a repository is named USER/NAME, got"):
        pull(repo)


def test_no_token_no_repository_no_network(hub, run, monkeypatch, tmp_path):
    with pytest.raises(
        InputError, match="cannot be fetched from the hub: there is no such repository, or it is private"
    ):
        pull("ann/absent")
    monkeypatch.setenv("HF_TOKEN", "bob")
    with pytest.raises(InputError, match=r"your token does not allow it \(status 401\): run `hf auth login`"):
        push(run[0], REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="it wants to know who you are"):
        push(run[0], REPO)
    assert not hub.repos
    aim(monkeypatch, "http://127.0.0.1:9", tmp_path / "other_cache")
    for action in (lambda: push(run[0], REPO), lambda: pull(REPO)):
        with pytest.raises(InputError, match="the hub: there is no network, or no answer"):
            action()


def test_only_weights_json_and_tables_are_fetched(hub, run, tmp_path):
    push(run[0], REPO)
    hub.repos[REPO] |= {"model.py": b"raise SystemExit", "pytorch_model.bin": b"x", "log.txt": b"x"}
    hub.asked.clear()
    back = pull(REPO)
    assert not [asked for asked in hub.asked if asked.endswith((".py", ".bin", ".txt", ".md"))]
    assert not list(back.folder.glob("*.py"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model.safetensors": b"no"}, "holds no finished run: model.safetensors is missing or broken"),
        ({"metrics.json": b"{}"}, "holds no finished run: metrics.json is broken"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "asks for code: its text encoder has the key 'auto_map'"),
        (
            {"text_config": {"attn_implementation": "u/kernel"}},
            "asks for code: its text encoder has the key 'attn_impl",
        ),
    ],
    ids=str,
)
def test_a_run_that_is_none_or_asks_for_code(hub, run, tmp_path, change, expected):
    push(run[0], REPO)
    files = hub.repos[REPO]
    if next(iter(change)) in files:
        files |= change
    else:
        settings = json.loads(files["config.json"])
        settings["text_encoder"]["config"] |= change
        files["config.json"] = json.dumps(settings).encode()
    with pytest.raises(InputError, match=expected):
        pull(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_the_commands(hub, run, benchmark, empty_folder):
    found, _ = run
    code, out, _ = benchmark("push", found.folder, REPO)
    assert (code, f"sent to {hub.url}/{REPO}" in "".join(out.split("\n"))) == (0, True)
    code, out, _ = benchmark("pull", REPO, "-o", "mine")
    assert (code, "run folder: mine" in out) == (0, True)
    code, _, err = benchmark("pull", REPO, "-o", "mine")
    assert (code, "mine is there already" in err) == (2, True)
    assert benchmark("push", "mine", "nobody")[0] == 2
