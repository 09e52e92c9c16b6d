"""An MMSA-style benchmark for multimodal sentiment analysis: `run`, `load_run`, `predict` and the contract for plugins.

`registry.metrics` holds the metrics, `registry.progress` what shows a run's progress, `registry.testing` the checks for
plugin authors.

Names are resolved on first use, so that `import registry` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "registry.contract": (
        "Batch Config DataInfo DatasetSpec FusionOutput HookSpec ModelSpec PublishedResult PublishedResults Range "
        "Rates Training TrainingData TrainingHook register_model"
    ),
    "registry.errors": "BenchmarkError InputError RunFailed",
    "registry.benchmark": "Result run",
    "registry.compare_models": "compare",
    "registry.comparison": "Comparison",
    "registry.data.splits": "FeatureFile SplitArrays",
    "registry.data.own_file": "write_feature_file",
    "registry.data.text": "TextEncoder find_text_encoder",
    "registry.reporting": "report",
    "registry.hub": "pull push",
    "registry.prediction": "predict",
    "registry.runs": "Run load_run",
    "registry.tuning": "Tuning tune",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in ("metrics", "progress", "testing"):
        return import_module(f"registry.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'registry' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
