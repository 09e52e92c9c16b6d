"""Weights of upstream's Self-MM (MMSA's `SELF_MM`, `.pth` files) in our network.

`translate` reads the sizes off the tensors and renames them; `network_from_state` builds the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from registry import DataInfo, InputError, TextEncoder

from .network import SelfMM, SelfMMConfig

_PREFIXES = {
    "text_model.": "encoders.text.",
    "audio_model.": "encoders.audio.",
    "video_model.": "encoders.vision.",
    "post_fusion_layer_": "fusion.layer_",
    "post_text_layer_": "heads.text.layer_",
    "post_audio_layer_": "heads.audio.layer_",
    "post_video_layer_": "heads.vision.layer_",
}


@dataclass(frozen=True)
class Translation:
    """An upstream checkpoint in our terms.

    `config` holds the keys that the tensors' shapes fix, `dims` the feature widths of the data it was trained on,
    `network` and `heads` the state dicts of `SelfMM` and of the unimodal heads.
    """

    config: dict[str, Any]
    dims: dict[str, int]
    network: dict[str, Tensor]
    heads: dict[str, Tensor]


def translate(state: Mapping[str, Tensor]) -> Translation:
    """Rename an upstream state dict (with or without the wrapper's prefix `Model.`) and read its sizes.

    Raises:
        InputError: it is not a Self-MM checkpoint; the message names the tensors that are missing or foreign.
    """
    state = {name.removeprefix("Model."): tensor for name, tensor in state.items()}
    foreign = [name for name in state if not name.startswith(tuple(_PREFIXES))]
    needed = ["audio_model.rnn.weight_ih_l0", "video_model.rnn.weight_ih_l0", "audio_model.linear_1.weight"]
    needed += ["video_model.linear_1.weight", "text_model.model.embeddings.word_embeddings.weight"]
    tasks = ("fusion", "text", "audio", "video")
    needed += [f"post_{task}_layer_{layer}.weight" for task in tasks for layer in (1, 2)]
    missing = [name for name in needed if name not in state]
    if foreign or missing:
        named = (("without", missing), ("with", foreign))
        faults = [f"{word} {', '.join(names[:3])}{', …' * (len(names) > 3)}" for word, names in named if names]
        raise InputError(f"this is not a checkpoint of upstream's Self-MM: {' and '.join(faults)}")
    # A unimodal head's width is that of its second layer too: a small file could claim any with the first alone.
    for task in tasks[1:]:
        first, second = (tuple(state[f"post_{task}_layer_{layer}.weight"].shape) for layer in (1, 2))
        if second != (first[0], first[0]):
            raise InputError(f"the head of {task} does not fit itself: layers of shape {first} and {second}")
    # Nothing reads the pooler, and only older versions of transformers save position ids.
    kept = {name: tensor for name, tensor in state.items() if ".pooler." not in name and "position_ids" not in name}
    renamed = {_rename(name): tensor for name, tensor in kept.items()}

    def rnn(name: str) -> tuple[int, int, int]:
        """Return hidden width, number of layers and input width of an upstream LSTM."""
        layers = len({m[1] for key in state if (m := re.match(rf"{name}\.rnn\.weight_ih_l(\d+)", key))})
        rows, columns = state[f"{name}.rnn.weight_ih_l0"].shape
        return rows // 4, layers, columns

    audio_hidden, audio_layers, audio_in = rnn("audio_model")
    video_hidden, video_layers, video_in = rnn("video_model")
    config = {
        "a_lstm_hidden_size": audio_hidden,
        "a_lstm_layers": audio_layers,
        "v_lstm_hidden_size": video_hidden,
        "v_lstm_layers": video_layers,
        "audio_out": len(state["audio_model.linear_1.weight"]),
        "video_out": len(state["video_model.linear_1.weight"]),
        **{f"post_{task}_dim": len(state[f"post_{task}_layer_1.weight"]) for task in tasks},
    }
    text_width = state["text_model.model.embeddings.word_embeddings.weight"].shape[1]
    return Translation(
        config=config,
        dims={"text": text_width, "audio": audio_in, "vision": video_in},
        network={name: tensor for name, tensor in renamed.items() if not name.startswith("heads.")},
        heads={name.removeprefix("heads."): tensor for name, tensor in renamed.items() if name.startswith("heads.")},
    )


def _rename(name: str) -> str:
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs).replace("linear_1.", "linear.")
    raise KeyError(name)


def network_from_state(state_dict: Mapping[str, Tensor], text_config: Mapping[str, Any]) -> SelfMM:
    """Build our network with upstream's weights.

    Args:
        state_dict: upstream's `SELF_MM` weights; the unimodal heads in it are left out (see `translate`).
        text_config: the text encoder's Hugging Face configuration, as a dict.

    Raises:
        InputError: the tensors are not Self-MM's, or do not fit `text_config`.
    """
    translation = translate(state_dict)
    encoder = TextEncoder.from_config(text_config)
    data = DataInfo(
        name="upstream",
        dims=translation.dims,
        max_lengths={},
        n_train=0,
        label_range=1.0,
        tasks=("M",),
        aligned=False,
        text_encoder=encoder,
    )
    if encoder.width != translation.dims["text"]:
        raise InputError(
            f"the checkpoint's text encoder is {translation.dims['text']} wide, the configuration says {encoder.width}"
        )
    with torch.random.fork_rng(devices=[]):  # its first weights are random
        network = SelfMM(SelfMMConfig(**translation.config), data)
    try:
        network.load_state_dict(translation.network)
    except RuntimeError as error:
        raise InputError(f"the checkpoint does not fit the text encoder's configuration: {error}") from error
    return network
