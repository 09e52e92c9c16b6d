"""Graph-MFN: MFN whose attention is a Dynamic Fusion Graph, with a node for each set of modalities.

Upstream never trains the networks of the graph's four multimodal nodes, since its optimiser does not see them, and does
not save them with the weights; here they are trained, unless `as_upstream`. It folds unaligned audio and vision
(`layers.fold`), and its LSTMs and memory go on through padding; here audio and vision are spread over the text's real
tokens, and all ends with a clip, unless `as_upstream`.
"""

# ruff: noqa: N815 (the keys are upstream's)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import relu

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FROZEN, Baseline, TextInput, at_end, needs, on_text_steps, presets, search
from .mfn import MODALITIES, GatedMemory, MemoryConfig, Network, Sizes, predict, windows

HIDDEN = 100
"""hidden width of the graph's networks, upstream's"""


class GraphMFNConfig(MemoryConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    weight_decay: float = Field(0.005, ge=0, description="L2 of everything but the text encoder")
    memsize: int = Field(300, ge=1, description="width of the memory")
    inner_node_dim: int = Field(64, ge=1, description="width of the graph's multimodal nodes")
    NNConfig: Sizes = Field({"drop": 0.0, "shapes": 32}, description="network that proposes the new memory")
    gamma1Config: Sizes = Field({"drop": 0.5, "shapes": 128}, description="network of the gate that keeps memory")
    gamma2Config: Sizes = Field({"drop": 0.5, "shapes": 64}, description="network of the gate that takes the proposal")
    outConfig: Sizes = Field({"drop": 0.0, "shapes": 256}, description="head")


class DynamicFusionGraph(nn.Module):
    """A node for each set of modalities, computed from the nodes of its subsets; a last one reads them all.

    Every edge has an efficacy, inferred from the modalities, that scales what goes along it.

    Args:
        dims: widths of the modalities.
        width: of the multimodal nodes and of the last one.
    """

    def __init__(self, dims: Mapping[str, int], width: int) -> None:
        super().__init__()
        sets = [names for size in range(1, len(dims) + 1) for names in combinations(dims, size)]
        widths = {names: dims[names[0]] if len(names) == 1 else width for names in sets}
        self.sources = {names: [s for s in sets if set(s) < set(names)] for names in sets if len(names) > 1}
        self.sources[()] = sets
        networks = {}
        for names, sources in self.sources.items():
            networks[_key(names)] = _two_layers(sum(widths[source] for source in sources), width)
        self.nodes = nn.ModuleDict(networks)
        self.edges = [len(sources) for sources in self.sources.values()]
        self.efficacy = nn.Sequential(*_two_layers(sum(dims.values()), width), nn.Linear(width, sum(self.edges)))

    def forward(self, modalities: Mapping[str, Tensor]) -> Tensor:
        """Return the last node (…, width), of modalities (…, d) in the order of `dims`."""
        efficacies = self.efficacy(torch.cat(list(modalities.values()), dim=-1)).split(self.edges, dim=-1)
        nodes: dict[Sequence[str], Tensor] = {(name,): value for name, value in modalities.items()}
        for (names, sources), efficacy in zip(self.sources.items(), efficacies, strict=True):
            incoming = [nodes[s] * scale[..., None] for s, scale in zip(sources, efficacy.unbind(-1), strict=True)]
            nodes[names] = self.nodes[_key(names)](torch.cat(incoming, dim=-1))
        return nodes[()]


def _key(names: Sequence[str]) -> str:
    return "_".join(names) or "all"


def _two_layers(in_features: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, HIDDEN), nn.Linear(HIDDEN, out))


class GraphMFN(Baseline):
    """Memory fusion of text, audio and vision by a graph."""

    def __init__(self, config: GraphMFNConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.as_upstream = config.as_upstream
        dims = data.dims
        widths = dict(zip(MODALITIES, config.hidden_dims, strict=True))
        self.rnn = nn.ModuleDict({name: nn.LSTM(dims[name], width, batch_first=True) for name, width in widths.items()})
        self.transform = nn.ModuleDict({name: nn.Linear(2 * width, width) for name, width in widths.items()})
        self.graph = DynamicFusionGraph(widths, config.inner_node_dim)
        if self.as_upstream:
            for names, network in self.graph.nodes.items():
                network.requires_grad_(names == "all")
        self.memory = GatedMemory(
            config.inner_node_dim, config.memsize, config.NNConfig, config.gamma1Config, config.gamma2Config
        )
        self.head = Network(sum(config.hidden_dims) + config.memsize, config.outConfig, 1)
        self.feature_dims = {**widths, "fusion": config.outConfig["shapes"]}

    def forward(self, batch: Batch) -> FusionOutput:
        sequences, lengths = on_text_steps(batch, *self.text(batch), as_upstream=self.as_upstream)
        states = {name: rnn(sequences[name])[0] for name, rnn in self.rnn.items()}
        singletons = {name: relu(self.transform[name](windows(values, 2))) for name, values in states.items()}
        memories = self.memory(self.graph(singletons))
        last = {name: at_end(values, lengths) for name, values in states.items()}
        return predict(self.head, last, at_end(memories, lengths))


SPEC = ModelSpec(
    name="graph_mfn",
    summary="Graph-MFN: MFN with a Dynamic Fusion Graph of the modalities",
    build=GraphMFN,
    config=GraphMFNConfig,
    presets=presets("graph_mfn"),
    training=Training(batch_size=32),
    needs=needs,
    per_sample=True,
    tuned_for=FROZEN,
    search=search("graph_mfn"),
    citation=(
        "Amir Zadeh, Paul Pu Liang, Soujanya Poria, Erik Cambria, Louis-Philippe Morency: Multimodal Language Analysis "
        "in the Wild: CMU-MOSEI Dataset and Interpretable Dynamic Fusion Graph. ACL 2018."
    ),
    url="https://aclanthology.org/P18-1208",
)
