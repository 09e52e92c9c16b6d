"""What is fuzzed: each function makes, in a folder, the reader of one input, and seeds or a strategy of inputs."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from registry.data import cache, checks, feature_file, mapped, safe_pickle
from registry.data.feature_file import read_feature_file
from tests.helpers import feature_file as write_feature_file
from tests.helpers import tiny_encoder
from tests.test_feature_file import contents

Reader = Callable[[Any], object]
SMALL = {"train": 2, "valid": 1, "test": 1}


def instrumented() -> Iterator[Any]:
    """Yield the functions whose branches guide atheris, Python's own readers among them."""
    import json.decoder

    import tomllib._parser

    from registry import checkpoints, config, runs

    for module in (
        cache,
        checks,
        feature_file,
        mapped,
        safe_pickle,
        checkpoints,
        config,
        runs,
        tomllib._parser,
        json.decoder,
    ):
        yield from (f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                yield from (f for f in vars(kind).values() if inspect.isfunction(f))
    yield from (f for f in vars(pickle._Unpickler).values() if inspect.isfunction(f))  # type: ignore[attr-defined]


def _file(folder: Path, name: str = "x.pkl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    read_feature_file(path, label_range=3.0)


def pickles(folder: Path) -> tuple[Reader, list[bytes]]:
    """Feature files as bytes."""
    path = _file(folder)
    seeds = [write_feature_file(folder, sizes=SMALL, protocol=protocol).read_bytes() for protocol in range(6)]
    return lambda data: _read(path, data), seeds


_NAMES = sorted(safe_pickle._ADMITTED)
_TEXTS = ["train", "valid", "test", "id", "regression_labels", "audio", "text_bert", "raw_text", "audio_lengths", "x"]


@st.composite
def _programs(draw: Any) -> bytes:
    """Pickles of well-formed operations in no sensible order."""

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()

    def name(value: str) -> bytes:
        module, _, last = value.rpartition(".")
        return b"c" + f"{module}\n{last}\n".encode()

    parts: list[bytes] = [pickle.PROTO + b"\x04"]
    number = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 3**300]))
    alone = b"N(0.l t]}) \x85\x86\x87 \x88\x89 2 1 a e s u b R o \x81 \x92 \x8f \x90 \x91 \x93 \x94 \x97 \x98".replace(
        b" ", b""
    )
    for _ in range(draw(st.integers(1, 60))):
        kind = draw(st.integers(0, 9))
        if kind < 4:
            parts.append(bytes([draw(st.sampled_from(alone))]))
        elif kind == 4:
            parts.append(name(draw(st.sampled_from(_NAMES))))
        elif kind == 5:
            parts.append(text(draw(st.sampled_from([*_TEXTS, "f4", "O8", "U2", "S3", "i8", "<", ">", "|", "C", "F"]))))
        elif kind == 6:
            parts.append(pickle.encode_long(draw(number)) and b"L%dL\n" % draw(number))
        elif kind == 7:
            data = draw(st.binary(max_size=16))
            parts.append(pickle.SHORT_BINBYTES + bytes([len(data)]) + data)
        elif kind == 8:
            parts.append(draw(st.sampled_from([b"q", b"h"])) + bytes([draw(st.integers(0, 5))]))
        else:
            array = np.zeros(
                draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.sampled_from(["f4", "O", "U2", "?"]))
            )
            parts.append(pickle.dumps(array, protocol=draw(st.integers(0, 3)))[:-1].removeprefix(b"\x80"))
    return b"".join(parts) + b"."


def opcodes(folder: Path) -> tuple[Reader, Any]:
    """Feature files as programs of pickle's operations."""
    path = _file(folder)
    return lambda data: _read(path, data), _programs()


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none()), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.complex_numbers(),
    st.sets(st.integers(), max_size=3),
)
_DTYPES = ["f2", "f4", "f8", "i1", "u1", "i8", "u8", "?", "U3", "S3", "O", "c16", "M8[s]"]


@st.composite
def _changed_files(draw: Any) -> bytes:
    """Valid contents with some values, dtypes and shapes changed."""
    written = draw(contents())[1]
    for _ in range(draw(st.integers(1, 4))):
        split = draw(st.sampled_from(["train", "valid", "test"]))
        arrays = written[split]
        key = draw(st.sampled_from([*arrays] or ["id"]))
        value = arrays.get(key)
        how = draw(st.integers(0, 5))
        if how == 0:
            arrays[key] = draw(_ODD)
        elif how == 1:
            arrays[draw(st.sampled_from([*_TEXTS, "vision_lengths", "regression_labels_T"]))] = draw(_ODD)
        elif how == 2 and isinstance(value, list) and value:
            value[draw(st.integers(0, len(value) - 1))] = draw(_ODD)
        elif how == 3:
            try:
                arrays[key] = np.array(value).astype(draw(st.sampled_from(_DTYPES)))
            except Exception:  # numpy raises all kinds for casts that there are not
                arrays[key] = draw(_ODD)
        elif how == 4:
            shape = draw(st.lists(st.integers(0, 3), max_size=5))
            arrays[key] = np.zeros(shape, draw(st.sampled_from(_DTYPES)))
        else:
            arrays.pop(key, None)
    return pickle.dumps(written, protocol=draw(st.integers(0, 5)))


def values(folder: Path) -> tuple[Reader, Any]:
    """Feature files with odd values."""
    path = _file(folder)
    return lambda data: _read(path, data), _changed_files()


def kept(folder: Path) -> tuple[Reader, list[bytes]]:
    """What is kept of feature files, made for its file: the digest of whatever header there is is set right."""
    cache.WORTH_KEEPING = 0
    _file(folder)
    path = write_feature_file(folder, sizes=SMALL)
    read_feature_file(path, label_range=3.0, cache=folder)
    place = next(folder.glob("features-*.safetensors"))
    key = cache.Cache(folder, path, variant="3.0", version=feature_file.FORMAT)._key(feature_file.file_sha256(path))

    def read(data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            rest = header.pop("__metadata__")["content"]
            header["__metadata__"] = {"content": rest, "digest": mapped._digest(header, rest, key)}
            encoded = json.dumps(header).encode()
            data = len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]
        except Exception:  # no header: it is read as it is
            pass
        place.write_bytes(data)
        read_feature_file(path, label_range=3.0, cache=folder)

    return read, [place.read_bytes()]


def configs(folder: Path) -> tuple[Reader, list[bytes]]:
    """Config files as bytes: the first one picks JSON or TOML."""
    from registry.config import _read_file
    from registry.plugins import Plugins

    spec = Plugins().load("model", "self_mm")
    _file(folder)
    seeds = [b'j{"batch_size": 8, "hook": {"distance": "cosine"}, "hook.label_range": 1.5}']
    seeds += [b'tbatch_size = 8\nmodalities = ["text", "audio"]\n[hook]\ndistance = "l2"\n']
    seeds += [b'j{"model": "self_mm", "preset": "author", "config": {"early_stop": 3, "learning_rate_bert": 1e-5}}']

    def read(data: bytes) -> None:
        path = folder / ("x.json" if data[:1] == b"j" else "x.toml")
        path.write_bytes(data[1:])
        _read_file(path, spec)

    return read, seeds


_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just("../../x"), st.just(10**400)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


@st.composite
def _changed_json(draw: Any, value: Any) -> str:
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*_places(value)]))
        if not path:
            return json.dumps(draw(_JSON)) if draw(st.integers(0, 9)) == 0 else json.dumps(value)
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        how = draw(st.integers(0, 3))
        if how == 0:
            del inside[path[-1]]
        elif how == 1 and isinstance(inside, dict):
            inside[draw(st.text(max_size=8))] = inside.pop(path[-1])
        else:
            inside[path[-1]] = draw(_JSON)
    return json.dumps(value)


@st.composite
def _changed_csv(draw: Any, text: str) -> str:
    lines = [line.split(",") for line in text.splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        line = draw(st.sampled_from(lines))
        cell = st.one_of(
            st.text(max_size=5), st.sampled_from(["", "nan", "inf", "1e999", '"', "9" * 400, "=1+1", "\x1b[2J"])
        )
        line[draw(st.integers(0, len(line) - 1))] = draw(cell)
    return "\n".join(map(",".join, lines)) + "\n"


def finished_runs(folder: Path) -> list[Path]:
    """Train two seeds of a tiny model; returns their folders."""
    import registry

    folder.mkdir(parents=True, exist_ok=True)
    result = registry.run(
        "self_mm",
        "custom",
        data=write_feature_file(folder),
        text_encoder=str(tiny_encoder(folder / "encoder")),
        label_range=3.0,
        seeds=[1111, 1112],
        runs=folder / "runs",
        config={"epochs": 2, "batch_size": 4, "update_epochs": 1},
        device="cpu",
    )
    return [run.folder for run in result.runs if run.folder]


def explore(folder: Path, *, figure: bool = False) -> None:
    """Do with a run folder all that a user can; raises InputError where it is none."""
    from registry import load_run
    from registry.comparison import collect
    from registry.forms import FORMS, render
    from registry.labels import draw, find_runs, generated_in_vain, places, read_labels
    from registry.runs import fault_of
    from registry.side_by_side import tables_of

    fault_of(folder)
    comparison = collect([folder.parent])
    tables_of(comparison)
    for form in FORMS:
        render(comparison, form)
    (run,) = find_runs(folder)
    assert load_run(folder) == run
    assert [run.metrics, run.best_epoch, run.predictions, run.history, generated_in_vain(run), run.environment]
    labels = read_labels(run)
    assert [labels.title, labels.movement_rows(), labels.by_clip(labels.best_epoch), labels.range]
    assert places([labels], None, ".png")[0].parent == Path()
    if figure:
        draw(labels)


def settings(folder: Path) -> tuple[Reader, Any]:
    """Config files of known keys with odd values."""
    from registry.jobs import make_plan

    path = _file(folder, "x.json")
    whole = make_plan("self_mm", "mosi").config.as_dict()

    def read(text: str) -> None:
        path.write_text(text)
        make_plan("self_mm", "mosi", config_file=path)

    return read, _changed_json({**whole, "hook": {"distance": "l2"}, "config": {}, "preset": "mmsa"})


def runs(folder: Path) -> tuple[Reader, Any]:
    """Run folders with a file changed, beside a whole one."""
    _, place = finished_runs(folder)
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    texts = {name: content.decode() for name, content in whole.items() if name.endswith((".json", ".csv"))}
    changed = [
        st.tuples(st.just(name), _changed_json(json.loads(text)) if name.endswith("json") else _changed_csv(text))
        for name, text in texts.items()
    ]

    def read(drawn: tuple[str, str]) -> None:
        shutil.rmtree(place)
        place.mkdir()
        for name, content in whole.items():
            (place / name).write_bytes(drawn[1].encode("utf-8", "surrogatepass") if name == drawn[0] else content)
        explore(place)

    return read, st.one_of(changed)


def models(folder: Path) -> tuple[Reader, Any]:
    """The model of a run folder whose settings were changed."""
    from registry import load_run

    _, place = finished_runs(folder)
    settings = json.loads((place / "config.json").read_text())

    def read(text: str) -> None:
        (place / "config.json").write_text(text)
        assert load_run(place).model

    return read, _changed_json(settings)


def checkpoints(folder: Path) -> tuple[Reader, list[bytes]]:
    """Files of torch.save as bytes."""
    import torch

    from registry.checkpoints import _read_weights

    path = _file(folder, "x.pth")
    seeds = []
    for new in (True, False):
        torch.save({"a": torch.zeros(2, 3), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=new)
        seeds.append(path.read_bytes())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _read_weights(path)

    return read, seeds


TARGETS: dict[str, Callable[[Path], tuple[Reader, Any]]] = {
    "pickle": pickles,
    "opcodes": opcodes,
    "values": values,
    "cache": kept,
    "config": configs,
    "settings": settings,
    "run": runs,
    "model": models,
    "checkpoint": checkpoints,
}
