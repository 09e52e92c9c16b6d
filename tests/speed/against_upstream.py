"""Self-MM here and upstream's own trainer, on the same file, text encoder and seeds, in one run on one machine.

    python -m tests.speed.against_upstream --data mosi.pkl --text-encoder minilm --seeds 1111-1113

Prints validation MAE at the chosen epoch, test metrics, and seconds for each epoch's training and validation,
side by side. Needs the package MMSA (extra `test`).
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from contextlib import redirect_stderr, suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import registry
from registry.data.text import find_text_encoder

METRICS = ("MAE", "Corr", "Has0_acc_2", "Non0_acc_2", "Mult_acc_5", "Mult_acc_7")


class _Enough(Exception):
    """Raised inside upstream's endless loop when the wanted number of epochs is done."""


def upstream(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train upstream's SELF_MM and return its figures; its loaders, model, trainer and metrics are its own."""
    from easydict import EasyDict
    from MMSA.data_loader import MMDataLoader
    from MMSA.models import AMIO
    from MMSA.trains.multiTask.SELF_MM import SELF_MM
    from MMSA.utils import setup_seed

    preset = json.loads(Path(__file__).parents[2].joinpath("selfmm_plugin/presets/mmsa.json").read_text())["mosi"]
    encoder = find_text_encoder(options.text_encoder)
    args = EasyDict(
        {key: value for key, value in preset.items() if key not in ("tail", "exclude_zero")},
        model_name="self_mm",
        dataset_name="mosi",
        train_mode="regression",
        custom_feature=str(options.data),
        feature_T="",
        feature_A="",
        feature_V="",
        feature_dims=[0, 0, 0],
        use_bert=True,
        use_finetune=True,
        need_data_aligned=False,
        need_model_aligned=False,
        need_normalized=False,
        excludeZero=preset["exclude_zero"],
        save_labels=False,
        KeyEval="Loss",
        H=3.0,
        transformers="bert",
        pretrained=encoder.source,
        text_out=encoder.width,
        device=torch.device(options.device),
        model_save_path=str(folder / f"upstream-{seed}.pth"),
    )
    setup_seed(seed)
    loaders = MMDataLoader(args, options.workers)
    args.train_samples = len(loaders["train"].dataset)
    model = AMIO(args).to(args.device)
    marks: list[float] = []
    valid: list[tuple[float, float]] = []

    class Timed(SELF_MM):
        def do_test(self, *positional: Any, **named: Any) -> dict[str, Any]:
            _synchronise(options.device)
            marks.append(time.perf_counter())
            results = super().do_test(*positional, **named)
            valid.append((results["Loss"], results["MAE"]))
            marks.append(time.perf_counter())
            return results

    class Capped(Timed):
        def do_test(self, *positional: Any, **named: Any) -> dict[str, Any]:
            if options.epochs and len(valid) == options.epochs:
                raise _Enough
            return super().do_test(*positional, **named)

    marks.append(time.perf_counter())
    with suppress(_Enough):
        Capped(args).do_train(model, loaders)
    trained, validated = marks[1::2], marks[2::2]
    starts = [marks[0], *validated]
    model.load_state_dict(torch.load(args.model_save_path))
    # Upstream chooses by its loss, the mean over batches of their means, rounded.
    chosen = min(valid, key=lambda figures: figures[0])
    test = SELF_MM(args).do_test(model, loaders["test"], mode="TEST")
    return {
        "seed": seed,
        "valid_mae": chosen[1],
        "best_epoch": valid.index(chosen) + 1,
        "epochs": len(validated),
        "test": {name: float(test[name]) for name in METRICS},
        "train_seconds": [end - start for start, end in zip(starts, trained, strict=False)][: len(validated)],
        "valid_seconds": [end - start for start, end in zip(trained, validated, strict=False)],
    }


def ours(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train ours through `registry.run` and return the same figures."""
    result = registry.run(
        "self_mm",
        "mosi",
        data=options.data,
        text_encoder=options.text_encoder,
        seeds=[seed],
        device=options.device,
        runs=folder / "runs",
        config={"epochs": options.epochs},
    )
    done = result.runs[0]
    if done.folder is None:
        raise SystemExit(f"seed {seed} failed: {done.reason}")
    run = registry.load_run(done.folder)
    return {
        "seed": seed,
        "valid_mae": run.summary["valid_mae"],
        "best_epoch": run.best_epoch,
        "epochs": len(run.history),
        "test": {name: run.metrics[name] for name in METRICS},
        "train_seconds": run.history["train_seconds"].tolist(),
        "valid_seconds": run.history["valid_seconds"].tolist(),
    }


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text-encoder", default="minilm")
    parser.add_argument("--seeds", default="1111-1113")
    parser.add_argument("--epochs", type=int, help="most epochs; early stopping alone by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=0, help="upstream's loader processes (its own default is 4)")
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    options = parser.parse_args()
    from registry.cli import _seeds

    figures: dict[str, list[dict[str, Any]]] = {"upstream": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in _seeds([options.seeds]):
            for name, train in (("upstream", upstream), ("ours", ours)):
                with redirect_stderr(io.StringIO()):  # upstream's bars would bury the figures
                    figures[name].append(train(options, seed, Path(folder)))
                last = figures[name][-1]
                print(f"{name} {seed}: validation MAE {last['valid_mae']:.4f}, test MAE {last['test']['MAE']:.4f}")
                if options.output:
                    options.output.write_text(json.dumps(figures, indent=1))
    rows = {"validation MAE": lambda run: run["valid_mae"]}
    rows |= {f"test {name}": (lambda run, name=name: run["test"][name]) for name in METRICS}
    print(f"\n{'':24}{'upstream':>20}{'ours':>20}")
    for label, value in rows.items():
        print(f"{label:24}" + "".join(f"{_spread([value(run) for run in figures[name]]):>20}" for name in figures))
    for part in ("train_seconds", "valid_seconds"):
        # The first epoch also pays for starting up.
        per_epoch = {name: mean(s for run in figures[name] for s in run[part][1:] or run[part]) for name in figures}
        ratio = per_epoch["upstream"] / per_epoch["ours"]
        label = part.replace("_seconds", "") + " seconds an epoch"
        print(f"{label:24}{per_epoch['upstream']:>20.2f}{per_epoch['ours']:>20.2f}   upstream / ours = {ratio:.2f}")


if __name__ == "__main__":
    main()
