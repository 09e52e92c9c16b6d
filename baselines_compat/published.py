"""Published results of the baselines and of Self-MM on MOSI, MOSEI, SIMS and SIMSv2, to stand beside one's own.

The text encoder is told of MMSA's regression results only, whose hyper-parameters say whether it was fine-tuned.
The Self-MM paper's tables hold its own figures and what it sets beside them, some of it re-run (see the notes).
"""

from __future__ import annotations

import json
from importlib.resources import files

from registry import PublishedResults

PUBLISHED = PublishedResults(
    name="mmsa",
    summary="MMSA's tables, the Self-MM paper's (second-hand), and two repetitions with 10 seeds",
    results=json.loads((files("baselines_compat") / "published_results.json").read_text("utf-8")),
)
