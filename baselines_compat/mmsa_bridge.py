"""Models of the installed package MMSA that have no version of their own here, as `mmsa_NAME`.

The networks are upstream's; this file gives them our batches and trains them by our contract. In all of them the text
encoder is the run's, whichever upstream would load. What each needs besides, and what differs:

- MMIM trains in two stages an epoch, with an optimiser each: the bounds of mutual information, over the whole split,
  then everything else. Here the stages take turns batch by batch, since a model sees batches and never a split. The
  stage of the bounds has its own optimiser and its own forward, as upstream. Where a class has too few clips for its
  covariance, upstream's entropy is −∞ or NaN; here it is left out of that batch's loss.
- MCTN's LSTMs run along the clips of a batch upstream, so that a prediction depends on the clips before it, and its
  attention along them too; here they run along time. Audio and vision that are not word-aligned, which upstream
  refuses, are spread over the tokens (`layers.align`).
- TFR-Net reads steps that upstream's loader has removed. The same ones are removed here from the train split;
  validation and test clips stay whole, as they are for every other model. Sequences are padded to what its attention
  over steps can split into heads. Upstream updates after every micro-batch, with the sum of the group's gradients so
  far; here once a group.

Both MMIM and MCTN clip gradients to a norm, over all of the model's parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.functional import l1_loss, pad

from registry import Batch, Config, DataInfo, FusionOutput, InputError, ModelSpec, TextEncoder, Training

from .layers import FINE_TUNED, FROZEN, Normalise, on_text_steps, real_steps, text_groups

try:
    import MMSA  # noqa: F401 (first, so that it is MMSA that is said to be missing)
    from easydict import EasyDict
    from MMSA.models.missingTask.TFR_NET.model import TFR_NET as UpstreamTFRNet  # noqa: N811
    from MMSA.models.singleTask.MCTN import MCTN as UpstreamMCTN  # noqa: N811
    from MMSA.models.singleTask.MCTN import Seq2Seq
    from MMSA.models.singleTask.MMIM import MMIM as UpstreamMMIM  # noqa: N811
except ImportError as error:
    raise ImportError(f'it needs the package MMSA ({error}): pip install "selfmm-plugin[mmsa]"') from error

MODALITIES = ("text", "audio", "vision")


def _presets(model: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return upstream's hyper-parameters under our names."""
    return {"mmsa": json.loads((files("baselines_compat") / "presets" / "bridge.json").read_text("utf-8"))[model]}


@contextmanager
def _reading(upstream: type[nn.Module], **parts: Any) -> Iterator[None]:
    """Let names that the module of upstream's class reads stand for other things, while the class is built."""
    names = vars(sys.modules[upstream.__module__])
    before = {name: names[name] for name in parts}
    names.update(parts)
    try:
        yield
    finally:
        names.update(before)


class Text(nn.Module):
    """The run's text encoder in the place of upstream's: tokens (B, 3, L) → states (B, L, width).

    Args:
        encoder: the run's.
        steps: how many of L are tokens; what is behind them becomes 0. All, by default.
    """

    def __init__(self, encoder: TextEncoder, steps: int | None = None, **upstream_s: Any) -> None:
        super().__init__()
        self.model = encoder.build()
        self.steps = steps

    def forward(self, tokens: Tensor) -> Tensor:
        ids, mask, segments = tokens[:, :, : self.steps].long().unbind(1)
        return _longer(self.model(ids, mask, segments), tokens.shape[2])


class Clock:
    """Tells a model where in training it is: an epoch is over when each of the `n_train` clips has come once."""

    def __init__(self, n_train: int) -> None:
        self.n_train = n_train
        self.epoch, self.batch, self.clips = 0, -1, n_train

    def tick(self, clips: int) -> None:
        """Count a batch; afterwards `epoch` counts from 1, and `batch` from 0 in each epoch."""
        if self.clips >= self.n_train:
            self.epoch, self.batch, self.clips = self.epoch + 1, -1, 0
        self.batch, self.clips = self.batch + 1, self.clips + clips


def _longer(sequence: Tensor, steps: int) -> Tensor:
    """Return a sequence (B, L, d) or (B, L) with zeros behind it, up to `steps`."""
    missing = steps - sequence.shape[1]
    return pad(sequence, (0, 0, 0, missing) if sequence.dim() == 3 else (0, missing))


def _clip_afterwards(prediction: Tensor, parameters: Sequence[Tensor], norm: float) -> None:
    """Clip gradients to a norm as soon as the backward pass through a prediction is done."""

    def clip() -> None:
        nn.utils.clip_grad_norm_(parameters, norm)

    prediction.register_hook(lambda _: Variable._execution_engine.queue_callback(clip))


# --- MMIM

CLASSES = ("pos", "neg")
"""upstream's names of clips whose label is above and below 0"""


class MMIMConfig(Config):
    """The defaults are upstream's for CMU-MOSI; names are upstream's where the registry has none."""

    learning_rate: float = Field(1e-3, ge=0, description="learning rate of everything else (upstream: lr_main)")
    weight_decay: float = Field(1e-4, ge=0, description="L2 of everything else (upstream: weight_decay_main)")
    learning_rate_bert: float = Field(5e-5, ge=0, description="learning rate of the text encoder (upstream: lr_bert)")
    weight_decay_bert: float = Field(1e-4, ge=0, description="L2 of the text encoder")
    lr_mmilb: float = Field(1e-3, ge=0, description="learning rate of the bounds of mutual information")
    weight_decay_mmilb: float = Field(1e-4, ge=0, description="L2 of the bounds")
    grad_clip: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    d_vh: int = Field(16, ge=1, description="width of vision's LSTM, in each direction")
    d_ah: int = Field(16, ge=1, description="width of audio's LSTM, in each direction")
    d_vout: int = Field(16, ge=4, description="width of vision's vector")
    d_aout: int = Field(16, ge=4, description="width of audio's vector")
    d_prjh: int = Field(128, ge=1, description="width of the fusion")
    dropout_prj: float = Field(0.1, ge=0, lt=1, description="dropout before the fusion")
    cpc_layers: int = Field(1, ge=1, description="layers of the networks that predict modalities from the fusion")
    add_va: bool = Field(False, description="bound the information between vision and audio too")
    mem_size: int = Field(1, ge=1, description="batches whose vectors are kept, for the entropy")
    alpha: float = Field(0.1, ge=0, description="weight of the contrastive loss")
    beta: float = Field(0.1, ge=0, description="weight of the bounds of mutual information, and of the entropy")


class BridgeMMIM(nn.Module):
    """Multimodal InfoMax; `features` are those that upstream names, "fusion" its head's second layer."""

    def __init__(self, config: MMIMConfig, data: DataInfo) -> None:
        super().__init__()
        self.config = config
        arguments = {
            **config.model_dump(),
            **{"feature_dims": [data.dims[name] for name in MODALITIES], "need_data_aligned": False},
            **{"n_layer": 1, "bidirectional": True, "cpc_activation": "Tanh", "train_mode": "regression"},
            **{"mmilb_mid_activation": "ReLU", "mmilb_last_activation": "Tanh"},
            **{"use_bert": True, "use_finetune": True, "transformers": None, "pretrained": None},
        }
        with _reading(UpstreamMMIM, BertTextEncoder=partial(Text, data.text_encoder)):
            self.network = UpstreamMMIM(EasyDict(arguments))
        self.pairs = ("tv", "ta", "va") if config.add_va else ("tv", "ta")
        text = {id(parameter) for parameter in self.network.bertmodel.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in text and parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        self.bounds_optimizer = torch.optim.Adam(
            self._of_bounds(), lr=config.lr_mmilb, weight_decay=config.weight_decay_mmilb
        )
        self.clock = Clock(data.n_train)
        self.every = 2 if data.name == "mosei" else 1  # upstream shows the bounds half of MOSEI
        self.memory: list[Mapping[str, Mapping[str, Tensor]]] = []
        widths = {"text": data.dims["text"], "audio": config.d_aout, "vision": config.d_vout}
        self.feature_dims = {**widths, "fusion": config.d_prjh}

    @property
    def bounds(self) -> list[nn.Module]:
        """The networks whose likelihood bounds the information that two modalities share."""
        return [getattr(self.network, f"mi_{pair}") for pair in self.pairs]

    def _of_bounds(self) -> list[nn.Parameter]:
        return [parameter for bound in self.bounds for parameter in bound.parameters()]

    def forward(self, batch: Batch) -> FusionOutput:
        inputs = self._inputs(batch)
        if not (self.training and batch.labels):
            return self._output(self.network(*inputs), {})
        self.clock.tick(len(batch))
        if self.clock.batch == 0:
            self.memory = []
        if torch.is_grad_enabled() and self.clock.batch % self.every == 0:
            self._train_bounds(inputs)
        made, entropy = self._run(inputs, batch.labels["M"])
        alpha, beta = self.config.alpha, self.config.beta
        losses = {"contrast": alpha * made["nce"], "information": -beta * made["lld"], "entropy": -beta * entropy}
        output = self._output(made, losses)
        if output.prediction.requires_grad:
            _clip_afterwards(output.prediction, list(self.parameters()), self.config.grad_clip)
        return output

    def _inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Return text (B, 3, L), and audio and vision (B, L, d) with their lengths."""
        assert batch.audio_lengths is not None
        assert batch.vision_lengths is not None
        audio, vision = (batch.audio, batch.audio_lengths.cpu()), (batch.vision, batch.vision_lengths.cpu())
        return _tokens(batch), audio, vision

    def _train_bounds(self, inputs: tuple[Any, ...]) -> None:
        """Move the bounds towards the likelihood of this batch; gradients that wait for an update stay as they are."""
        waiting = [(parameter, parameter.grad) for parameter in self.parameters()]
        self.zero_grad()
        (-self.network(*inputs)["lld"]).backward()
        nn.utils.clip_grad_norm_(self.parameters(), self.config.grad_clip)
        self.bounds_optimizer.step()
        for parameter, gradient in waiting:
            parameter.grad = gradient

    def _run(self, inputs: tuple[Any, ...], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Return what upstream's model makes of a batch, and the entropy, or 0 if it is not to be used."""
        if len(labels) == 1:  # upstream cannot tell apart the classes of one clip
            return self.network(*inputs), labels.new_zeros(())
        number, size = self.clock.batch, self.config.mem_size
        kept = {pair: {sign: [old[pair][sign] for old in self.memory] for sign in CLASSES} for pair in self.pairs}
        full = len(self.memory) == size
        made = self.network(*inputs, y=labels[:, None], mem=kept if full else dict.fromkeys(self.pairs))
        now = {pair: {sign: made["pn_dic"][pair][sign].detach() for sign in CLASSES} for pair in self.pairs}
        if full:
            self.memory[number % size] = now
        else:
            self.memory.append(now)
        if number > size and self._is_defined(made, kept):
            return made, made["H"]
        vectors = [made["pn_dic"][pair][sign] for pair in self.pairs for sign in CLASSES]
        return made, 0.0 * torch.stack([vector.sum() for vector in vectors]).sum()

    def _is_defined(self, made: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
        """Whether both classes have a covariance of full rank, and an entropy."""
        classes = [[*kept[pair][sign], made["pn_dic"][pair][sign]] for pair in self.pairs for sign in CLASSES]
        return all(map(_spans, classes)) and bool(made["H"].isfinite())

    def _output(self, made: Mapping[str, Any], losses: dict[str, Tensor]) -> FusionOutput:
        names = {"text": "Feature_t", "audio": "Feature_a", "vision": "Feature_v", "fusion": "Feature_f"}
        features = {name: made[theirs] for name, theirs in names.items()}
        return FusionOutput(prediction=made["M"].squeeze(-1), features=features, losses=losses)

    def parameter_groups(self, config: MMIMConfig) -> list[dict[str, Any]]:
        """Return the optimiser's groups: the bounds, which the second stage leaves as they are, text, the rest."""
        bounds, text = self._of_bounds(), list(self.network.bertmodel.parameters())
        taken = {id(parameter) for parameter in (*bounds, *text)}
        others = [parameter for parameter in self.parameters() if id(parameter) not in taken]
        return [
            {"params": bounds, "lr": 0.0, "weight_decay": 0.0},
            {"params": text, "lr": config.learning_rate_bert, "weight_decay": config.weight_decay_bert},
            {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        ]


def _tokens(batch: Batch) -> Tensor:
    """Return ids, mask and segments (B, 3, L)."""
    assert batch.text_ids is not None
    assert batch.text_mask is not None
    assert batch.text_segments is not None
    return torch.stack([batch.text_ids, batch.text_mask, batch.text_segments], dim=1)


MMIM = ModelSpec(
    name="mmsa_mmim",
    summary="MMIM, run by the package MMSA: information that modalities share is kept; stages alternate by batch",
    build=BridgeMMIM,
    config=MMIMConfig,
    presets=_presets("mmim"),
    training=Training(batch_size=32, scheduler="plateau", scheduler_patience=20, scheduler_factor=0.5),
    needs=("text", "audio", "vision"),
    tuned_for=FINE_TUNED,
    citation=(
        "Wei Han, Hui Chen, Soujanya Poria: Improving Multimodal Fusion with Hierarchical Mutual Information "
        "Maximization for Multimodal Sentiment Analysis. EMNLP 2021."
    ),
    url="https://arxiv.org/abs/2109.00412",
)


# --- MCTN


class MCTNConfig(Config):
    """The defaults are upstream's for CMU-MOSI."""

    learning_rate: float = Field(1e-4, ge=0, description="learning rate (upstream: init_lr)")
    grad_clip: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    hid_dim: int = Field(32, ge=1, description="width of the joint representation")
    max_seq_len: int = Field(50, ge=2, description="steps that are read; the rest is cut")


class Translation(Seq2Seq):  # type: ignore[misc]
    """Upstream's translation of one sequence into another, which has time first, on batches (B, L, d)."""

    def forward(self, source: Tensor, target: Tensor, teacher_forcing: float) -> tuple[Tensor, Tensor]:
        self.device = source.device
        states, made = super().forward(source.transpose(0, 1), target.transpose(0, 1), teacher_forcing)
        return states.transpose(0, 1), made.transpose(0, 1)


class BridgeMCTN(nn.Module):
    """Text is translated to vision and back, and what is learned of it to audio; the joint states predict.

    Every modality is 0 beyond its width, up to the widest. Predictions need text alone, and no modality has a vector of
    its own: there are no features.
    """

    def __init__(self, config: MCTNConfig, data: DataInfo) -> None:
        super().__init__()
        self.steps, self.norm = data.max_lengths["text"], config.grad_clip
        self.width = max(data.dims[name] for name in MODALITIES)
        arguments = {**config.model_dump(), "output_dim": self.width, "use_bert": False}
        with _reading(UpstreamMCTN, Seq2Seq=Translation):
            self.network = UpstreamMCTN(EasyDict(arguments))
        self.network.regression.rnn.batch_first = True
        self.feature_dims: dict[str, int] = {}

    def forward(self, batch: Batch) -> FusionOutput:
        text, audio, vision = self._inputs(batch)
        labels = batch.labels.get("M", torch.zeros_like(text[:, 0, 0]))
        if len(batch) == 1:  # upstream takes a batch of one for none
            text, audio, vision, labels = (torch.cat([tensor, tensor]) for tensor in (text, audio, vision, labels))
        loss, made = self.network(text, audio, vision, labels[:, None], None)
        # The loss has that of the prediction in it, which the training loop adds.
        translation = loss - l1_loss(made, labels[:, None])
        prediction = made[: len(batch), 0]
        if self.training and prediction.requires_grad:
            _clip_afterwards(prediction, list(self.parameters()), self.norm)
        is_trained = self.training and bool(batch.labels)
        return FusionOutput(prediction=prediction, losses={"translation": translation} if is_trained else {})

    def _inputs(self, batch: Batch) -> list[Tensor]:
        """Return text, audio and vision on the text's steps, (B, L, width) each."""
        assert batch.text is not None
        lengths = batch.text_lengths
        if lengths is None:
            lengths = torch.full_like(batch.index, batch.text.shape[1])
        aligned, _ = on_text_steps(batch, _longer(batch.text, self.steps), lengths, as_upstream=False)
        return [pad(aligned[name], (0, self.width - aligned[name].shape[2])) for name in MODALITIES]

    def parameter_groups(self, config: MCTNConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": config.learning_rate, "weight_decay": 0.0}]


MCTN = ModelSpec(
    name="mmsa_mctn",
    summary="MCTN, run by the package MMSA: text is translated to vision and audio; time and batch are put right",
    build=BridgeMCTN,
    config=MCTNConfig,
    presets=_presets("mctn"),
    training=Training(batch_size=32),
    needs=("text_features", "audio", "vision", "padding"),
    tuned_for=FROZEN,
    citation=(
        "Hai Pham, Paul Pu Liang, Thomas Manzini, Louis-Philippe Morency, Barnabás Póczos: Found in Translation: "
        "Learning Robust Joint Representations by Cyclic Translations Between Modalities. AAAI 2019."
    ),
    url="https://arxiv.org/abs/1812.07809",
)


# --- TFR-Net

UNKNOWN = 100
"""[UNK] of BERT's vocabularies, English and Chinese"""

Dropout = partial(Field, ge=0, lt=1)


class TFRNetConfig(Config):
    """The defaults are upstream's for CMU-MOSI; names are upstream's where the registry has none."""

    learning_rate: float = Field(1e-3, ge=0, description="learning rate of everything else")
    weight_decay: float = Field(1e-3, ge=0, description="L2 of everything else")
    learning_rate_bert: float = Field(2e-6, ge=0, description="learning rate of the text encoder")
    weight_decay_bert: float = Field(1e-4, ge=0, description="L2 of it, biases and LayerNorms excepted")
    missing_rate: tuple[float, float, float] = Field(
        (0.2, 0.2, 0.2), description="share of the steps of text, audio and vision that training clips lack"
    )
    missing_seed: tuple[int, int, int] = Field((1111, 1111, 1111), description="which ones, of text, audio and vision")
    dst_feature_dim_nheads: tuple[int, int] = Field((30, 6), description="width of the attention, and its heads")
    num_temporal_head: int = Field(25, ge=1, description="heads of the attention over steps; lengths are multiples")
    nlevels: int = Field(3, ge=1, description="layers from one modality to another; within one there are 3 or more")
    attn_mask: bool = Field(True, description="a step sees no later ones")
    conv1d_kernel_size_l: int = Field(1, ge=1, description="steps that the convolution of text joins: an odd number")
    conv1d_kernel_size_a: int = Field(5, ge=1, description="steps that the convolution of audio joins: an odd number")
    conv1d_kernel_size_v: int = Field(3, ge=1, description="steps that the convolution of vision joins: an odd number")
    text_dropout: float = Dropout(0.2, description="dropout of the text's features")
    embed_dropout: float = Dropout(0.2, description="dropout of sequences before their first layer")
    attn_dropout: float = Dropout(0.2, description="dropout of attention to text, and over steps")
    attn_dropout_a: float = Dropout(0.1, description="dropout of attention to audio")
    attn_dropout_v: float = Dropout(0.0, description="dropout of attention to vision")
    relu_dropout: float = Dropout(0.2, description="dropout inside a layer's feed-forward part")
    res_dropout: float = Dropout(0.2, description="dropout of what a layer adds")
    fusion_t_hid: int = Field(36, ge=1, description="width of the text's vector")
    fusion_a_hid: int = Field(20, ge=1, description="width of audio's vector")
    fusion_v_hid: int = Field(48, ge=1, description="width of vision's vector")
    fusion_gru_layers: int = Field(3, ge=1, description="layers of the GRUs that make them")
    fusion_drop: float = Dropout(0.2, description="dropout of the vectors")
    cls_hidden_dim: int = Field(128, ge=1, description="width of the head")
    cls_dropout: float = Dropout(0.0, description="dropout in the head")
    weight_gen_loss: tuple[float, float, float] = Field(
        (5.0, 2.0, 20.0), description="weights of the losses of reconstruction of text, audio and vision"
    )
    weight_sim_loss: float = Field(5.0, ge=0, description="weight in them of how far distributions are apart")

    @field_validator("missing_rate")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= rate < 1 for rate in value):
            raise ValueError("must be shares, from 0 to less than 1")
        return value

    @field_validator("missing_seed")
    @classmethod
    def _are_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 <= seed < 2**32 for seed in value):
            raise ValueError("must be seeds, from 0 to 4294967295")
        return value

    @field_validator("dst_feature_dim_nheads")
    @classmethod
    def _divides(cls, value: tuple[int, int]) -> tuple[int, int]:
        width, heads = value
        if not (heads >= 1 and width >= 4 and width % heads == 0):
            raise ValueError("must be a width of 4 or more and a number of heads that divides it")
        return value

    @field_validator("conv1d_kernel_size_l", "conv1d_kernel_size_a", "conv1d_kernel_size_v")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that a sequence keeps its length")
        return value


class BridgeTFRNet(nn.Module):
    """Feature reconstruction; the vectors of modalities are what its gated GRUs give."""

    there_text: Tensor

    def __init__(self, config: TFRNetConfig, data: DataInfo) -> None:
        super().__init__()
        encoder, heads = data.text_encoder, config.num_temporal_head
        assert encoder is not None
        self.lengths = data.max_lengths
        self.padded = {name: -(-data.max_lengths[name] // heads) * heads for name in MODALITIES}
        arguments = {
            **config.model_dump(),
            **{"feature_dims": [data.dims[name] for name in MODALITIES], "seq_lens": list(self.padded.values())},
            **{"alignmentModule": "crossmodal_attn", "generatorModule": "linear", "fusionModule": "c_gate"},
            **{"recloss_type": "combine", "without_generator": False, "use_bert_finetune": True, "device": "cpu"},
        }
        with _reading(UpstreamTFRNet, BertTextEncoder=partial(Text, encoder, data.max_lengths["text"])):
            self.network = UpstreamTFRNet(EasyDict(arguments))
        self.network.gen_loss.eps = 1e-4  # upstream's is a tensor that stays on its device
        widths = {"text": config.fusion_t_hid, "audio": config.fusion_a_hid, "vision": config.fusion_v_hid}
        self._fusion.classifier.linear_trans_norm = Normalise(sum(widths.values()))
        self.unknown = _unknown(encoder)
        for name, rate, seed in zip(MODALITIES, config.missing_rate, config.missing_seed, strict=True):
            shape = data.n_train, data.max_lengths[name]
            there = torch.from_numpy(np.random.RandomState(seed).uniform(size=shape) > rate)
            self.register_buffer(f"there_{name}", there, persistent=False)
        self.clock = Clock(data.n_train)
        self.feature_dims = {**widths, "fusion": config.cls_hidden_dim}

    @property
    def _fusion(self) -> Any:
        return self.network.fusion_subnet.Model

    def forward(self, batch: Batch) -> FusionOutput:
        is_trained = self.training and bool(batch.labels)
        if is_trained:
            self.clock.tick(len(batch))
        inputs = self._text(batch, is_trained), *(self._other(batch, name, is_trained) for name in MODALITIES[1:])
        watched = {name: getattr(self._fusion, f"{name}_encoder") for name in MODALITIES}
        with _results_of({**watched, "fusion": self._fusion.classifier.linear_trans_activation}) as features:
            made, reconstruction = self.network(*inputs)
        # Reconstruction counts from the second epoch on, as upstream.
        losses = {"reconstruction": reconstruction} if is_trained and self.clock.epoch > 1 else {}
        return FusionOutput(prediction=made.squeeze(-1), features=features, losses=losses)

    def _text(self, batch: Batch, incomplete: bool) -> tuple[Tensor, ...]:
        """Return tokens (B, 3, L), the same with some unknown, and a mask (B, L) of those that are known."""
        steps = self.lengths["text"]
        ids, mask, segments = (_longer(part, steps) for part in _tokens(batch).unbind(1))
        there = mask.bool()
        if incomplete:
            step, last = torch.arange(steps, device=mask.device), mask.sum(1, keepdim=True) - 1
            there = there & (self.there_text[batch.index] | (step == 0) | (step == last))
        known = torch.where(mask.bool() & ~there, self.unknown, ids)
        whole, some = (torch.stack([made, mask, segments], dim=1) for made in (ids, known))
        missing = self.padded["text"] - steps
        return pad(whole, (0, missing)), pad(some, (0, missing)), pad(there.float(), (0, missing))

    def _other(self, batch: Batch, name: str, incomplete: bool) -> tuple[Tensor, ...]:
        """Return a modality (B, L, d), the same with some steps 0, a mask (B, L) of real steps and one of the rest."""
        sequence = _longer(getattr(batch, name), self.padded[name])
        real = real_steps(getattr(batch, f"{name}_lengths"), self.padded[name])
        there = real
        if incomplete:
            there = real & _longer(getattr(self, f"there_{name}")[batch.index], self.padded[name])
        return sequence, torch.where(there[:, :, None], sequence, 0.0), real.float(), there.float()

    def parameter_groups(self, config: TFRNetConfig) -> list[dict[str, Any]]:
        """Return the optimiser's groups: the text encoder's, then everything else."""
        taken = {id(parameter) for parameter in self.network.text_model.parameters()}
        others = [parameter for parameter in self.parameters() if id(parameter) not in taken]
        rest = {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay}
        return [*text_groups(self.network.text_model, config), rest]


def _spans(vectors: Sequence[Tensor]) -> bool:
    """Whether vectors (n, d) within ±1 differ in every direction, so that their covariance has a determinant."""
    joined = torch.cat(list(vectors))
    if len(joined) <= joined.shape[1]:
        return False
    return int(torch.linalg.matrix_rank(joined - joined.mean(0), atol=1e-3)) == joined.shape[1]


def _unknown(encoder: TextEncoder) -> int:
    """Return the id that stands for a missing token."""
    if encoder.source is None:  # without a vocabulary of its own, it is not trained
        return min(UNKNOWN, encoder.config.get("vocab_size", UNKNOWN + 1) - 1)
    unknown = encoder.tokenizer().unk_token_id
    if unknown is None:
        raise InputError(
            f"mmsa_tfr_net hides tokens behind the one for unknown words, which text encoder {encoder.name!r} lacks"
        )
    return unknown


@contextmanager
def _results_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Give what modules return while the block runs, by name."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_hook(lambda *call, name=name: found.update({name: call[-1]})))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


TFR_NET = ModelSpec(
    name="mmsa_tfr_net",
    summary="TFR-Net, run by the package MMSA: rebuilds steps that training clips lack; tested on whole clips",
    build=BridgeTFRNet,
    config=TFRNetConfig,
    presets=_presets("tfr_net"),
    training=Training(
        batch_size=24,
        update_epochs=4,
        clip_value=0.8,
        scheduler="plateau",
        scheduler_patience=5,
        scheduler_factor=0.1,
        early_stop=6,
    ),
    needs=("text", "audio", "vision", "padding"),
    tuned_for=FINE_TUNED,
    citation=(
        "Ziqi Yuan, Wei Li, Hua Xu, Wenmeng Yu: Transformer-based Feature Reconstruction Network for Robust "
        "Multimodal Sentiment Analysis. ACM Multimedia 2021."
    ),
    url="https://doi.org/10.1145/3474085.3475585",
)
