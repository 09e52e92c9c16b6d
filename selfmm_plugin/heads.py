"""The prediction head that the fusion task and every unimodal task of Self-MM share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class PredictionHead(nn.Module):
    """Dropout → linear → ReLU → linear → ReLU → linear, from features (B, d) to a sentiment (B).

    The first layer's output is the task's representation: it is what ULGM reads.
    """

    def __init__(self, in_features: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layer_1 = nn.Linear(in_features, hidden)
        self.layer_2 = nn.Linear(hidden, hidden)
        self.layer_3 = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction (B) and the representation (B, hidden)."""
        representation = relu(self.layer_1(self.dropout(features)))
        return self.layer_3(relu(self.layer_2(representation))).squeeze(-1), representation


_TAKEN = frozenset(dir(nn.ModuleDict()))


def module_key(name: str) -> str:
    """Return a task's key in an `nn.ModuleDict`, which takes neither dots nor names of its own, such as `type`."""
    key = name.replace(".", "·")
    return f"{key}·" if key in _TAKEN else key
