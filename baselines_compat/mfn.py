"""MFN, the Memory Fusion Network: an LSTM for each modality, and a gated memory of what their cells do together.

Upstream averages audio and vision over time before MFN sees them, so that their LSTMs read one value again and again;
here they are sequences, spread over the text's real tokens, unless `as_upstream`. Its LSTMs and memory go on through
padding; here they end with a clip, unless `as_upstream`.
"""

# ruff: noqa: N815 (the keys are upstream's)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, addmm, nn
from torch.nn.functional import linear, pad, relu

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FROZEN, Baseline, BaselineConfig, TextInput, at_end, needs, on_text_steps, presets, search

MODALITIES = ("text", "audio", "vision")


def _checked(table: dict[str, Any]) -> dict[str, Any]:
    drop, shapes = table.get("drop"), table.get("shapes")
    numbers = type(drop) in (int, float) and type(shapes) is int
    if len(table) != 2 or not numbers or not 0 <= drop < 1 or shapes < 1:  # type: ignore[operator]
        raise ValueError("must have drop, a number from 0 to less than 1, and shapes, an integer of at least 1")
    return table


Sizes = Annotated[dict[str, Any], AfterValidator(_checked)]
"""dropout (`drop`) and hidden width (`shapes`) of a `Network`"""


class MemoryConfig(BaselineConfig):
    """Keys of MFN, Graph-MFN and MFM."""

    learning_rate: float = Field(2e-3, ge=0, description="learning rate of everything but the text encoder")
    hidden_dims: tuple[int, int, int] = Field((256, 32, 256), description="widths of the text, audio and vision LSTM")
    memsize: int = Field(400, ge=1, description="width of the memory")


class MFNConfig(MemoryConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    windowsize: int = Field(2, ge=1, description="steps whose cells the attention compares")
    NN1Config: Sizes = Field({"drop": 0.2, "shapes": 32}, description="network of the attention over cells")
    NN2Config: Sizes = Field({"drop": 0.0, "shapes": 64}, description="network that proposes the new memory")
    gamma1Config: Sizes = Field({"drop": 0.7, "shapes": 256}, description="network of the gate that keeps memory")
    gamma2Config: Sizes = Field({"drop": 0.5, "shapes": 32}, description="network of the gate that takes the proposal")
    outConfig: Sizes = Field({"drop": 0.0, "shapes": 128}, description="head")


class Network(nn.Module):
    """Linear → ReLU → dropout → linear, which everything but the LSTMs is made of."""

    def __init__(self, in_features: int, sizes: Mapping[str, Any], out: int) -> None:
        super().__init__()
        self.layer_1 = nn.Linear(in_features, sizes["shapes"])
        self.dropout = nn.Dropout(sizes["drop"])
        self.layer_2 = nn.Linear(sizes["shapes"], out)

    def forward(self, features: Tensor) -> Tensor:
        return self.finish(self.layer_1(features))

    def finish(self, first: Tensor) -> Tensor:
        """Return the result, given that of the first layer."""
        return self.layer_2(self.dropout(relu(first)))


def windows(states: Tensor, size: int) -> Tensor:
    """Join each step of (B, L, d) with those before it, the oldest first, 0 before the start: (B, L, size·d)."""
    return pad(states, (0, 0, size - 1, 0)).unfold(1, size, 1).transpose(2, 3).flatten(2)


class GatedMemory(nn.Module):
    """The memory u_t = γ₁·u_{t-1} + γ₂·û_t: û is proposed from what is seen, γ from that and the memory.

    Args:
        seen: width of what is seen.
        memory: width of the memory.
        proposal, keep, take: sizes of the networks of û, γ₁ and γ₂.
    """

    def __init__(
        self,
        seen: int,
        memory: int,
        proposal: Mapping[str, Any],
        keep: Mapping[str, Any],
        take: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.split = (seen, memory)
        self.propose = Network(seen, proposal, memory)
        self.keep = Network(seen + memory, keep, memory)
        self.take = Network(seen + memory, take, memory)

    def forward(self, seen: Tensor) -> Tensor:
        """Return the memory (B, L, memory) at every step of what is seen (B, L, seen)."""
        proposals = self.propose(seen).tanh()
        # All that does not depend on the memory is computed for all steps at once, and both gates together.
        gates = (self.keep.layer_1, self.take.layer_1)
        weight = torch.cat([gate.weight for gate in gates])
        of_seen, of_memory = weight.split(self.split, dim=1)
        firsts = linear(seen, of_seen, torch.cat([gate.bias for gate in gates]))
        memory, memories = seen.new_zeros(len(seen), self.split[1]), []
        for first, proposal in zip(firsts.unbind(1), proposals.unbind(1), strict=True):
            to_keep, to_take = addmm(first, memory, of_memory.T).split([len(gate.weight) for gate in gates], dim=1)
            keep, take = self.keep.finish(to_keep).sigmoid(), self.take.finish(to_take).sigmoid()
            memory = keep * memory + take * proposal
            memories.append(memory)
        return torch.stack(memories, dim=1)


class MemoryFusion(nn.Module):
    """MFN without its head: the system of LSTMs, the attention over their cells, and the memory."""

    def __init__(self, config: MFNConfig, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.widths = dict(zip(MODALITIES, config.hidden_dims, strict=True))
        self.rnn = nn.ModuleDict({name: nn.LSTMCell(dims[name], width) for name, width in self.widths.items()})
        self.window = config.windowsize
        seen = sum(config.hidden_dims) * config.windowsize
        self.attention = Network(seen, config.NN1Config, seen)
        self.memory = GatedMemory(seen, config.memsize, config.NN2Config, config.gamma1Config, config.gamma2Config)
        self.width = sum(config.hidden_dims) + config.memsize

    def forward(self, sequences: Mapping[str, Tensor], lengths: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return each modality's last state (B, d), and the last memory (B, m), of sequences (B, L, d)."""
        states, cells = {}, []
        for name, cell in self.rnn.items():
            states[name], of_modality = states_and_cells(cell, sequences[name])
            cells.append(of_modality)
        seen = windows(torch.cat(cells, dim=-1), self.window)
        memories = self.memory(self.attention(seen).softmax(-1) * seen)
        return {name: at_end(values, lengths) for name, values in states.items()}, at_end(memories, lengths)


def states_and_cells(rnn: nn.Module, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Return an LSTM's state and cell (B, L, h each) at every step; `nn.LSTM` keeps the cells to itself."""
    state, steps = None, []
    for step in sequence.unbind(1):
        state = rnn(step, state)
        steps.append(state)
    states, cells = zip(*steps, strict=True)
    return torch.stack(states, dim=1), torch.stack(cells, dim=1)


class MFN(Baseline):
    """Memory fusion of text, audio and vision."""

    def __init__(self, config: MFNConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.as_upstream = config.as_upstream
        self.fusion = MemoryFusion(config, data.dims)
        self.head = Network(self.fusion.width, config.outConfig, 1)
        self.feature_dims = {**self.fusion.widths, "fusion": config.outConfig["shapes"]}

    def forward(self, batch: Batch) -> FusionOutput:
        if self.as_upstream:
            assert batch.audio is not None
            assert batch.vision is not None
            batch = replace(batch, audio=batch.audio.mean(1, True), vision=batch.vision.mean(1, True))
        sequences, lengths = on_text_steps(batch, *self.text(batch), as_upstream=self.as_upstream)
        return predict(self.head, *self.fusion(sequences, lengths))


def predict(head: Network, features: dict[str, Tensor], memory: Tensor) -> FusionOutput:
    """Return what a head makes of the modalities' last states and the last memory."""
    first = head.layer_1(torch.cat([*features.values(), memory], dim=-1))
    return FusionOutput(prediction=head.finish(first).squeeze(-1), features={**features, "fusion": relu(first)})


SPEC = ModelSpec(
    name="mfn",
    summary="MFN: LSTMs whose cells are attended together, and a gated memory",
    build=MFN,
    config=MFNConfig,
    presets=presets("mfn"),
    training=Training(batch_size=128),
    needs=needs,
    per_sample=True,
    tuned_for=FROZEN,
    search=search("mfn"),
    citation=(
        "Amir Zadeh, Paul Pu Liang, Navonil Mazumder, Soujanya Poria, Erik Cambria, Louis-Philippe Morency: Memory "
        "Fusion Network for Multi-view Sequential Learning. AAAI 2018."
    ),
    url="https://arxiv.org/abs/1802.00927",
)
