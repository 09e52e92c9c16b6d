"""Self-MM here and upstream's own trainer, in one run on one machine. Needs the package MMSA (extra `test`).

How fast are both? On synthetic data in the shape of CMU-MOSI or CMU-MOSEI, with a BERT-base of random weights:

    python -m tests.speed.against_upstream --shape mosi --device cuda --precision tf32 bf16
    python -m tests.speed.against_upstream --shape mosei --output mosei.json
    python -m tests.speed.against_upstream --shape mosi --tiny            # in seconds: only whether it works

First both must do the same work: from the same weights, their losses of the first updates are compared, and where they
differ nothing is timed (exit code 1). Then each is timed in a process of its own.

How good are both? On a real file, with a real text encoder:

    python -m tests.speed.against_upstream --data mosi.pkl --text-encoder minilm --seeds 1111-1113

prints validation MAE at the chosen epoch, test metrics, and seconds for each epoch's training and validation.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from . import machine, measure, ours, shapes, table

PRECISIONS = ("fp32", "tf32", "bf16")


def time_both(options: argparse.Namespace) -> None:
    """Time both on synthetic data, and print and write the figures."""
    shape = shapes.tiny(shapes.SHAPES[options.shape]) if options.tiny else shapes.SHAPES[options.shape]
    # With other work on the machine, the cores of a tiny one would mostly wait for each other.
    with tempfile.TemporaryDirectory() as made, machine.threads(1 if options.tiny else None):
        folder = Path(made)
        content = shapes.make_features(shape)
        data, encoder = shapes.write_features(content, folder / "features.pkl"), folder / "encoder"
        shapes.write_encoder(shape, encoder)
        case = measure.Case(shape, data, str(encoder), options.device, folder)
        report = {
            "command": shlex.join(["python", "-m", "tests.speed.against_upstream", *options.typed]),
            "machine": machine.describe(options.device),
            "versions": machine.versions(options.device),
            "data": shapes.facts(shape, content, ours.preset(shape.dataset)),
        }
        _say(report)
        labels = content["train"]["regression_labels"]
        del content
        _measure(case, options, labels, report)


def _say(report: dict[str, Any]) -> None:
    data = report["data"]
    clips = ", ".join(f"{count} {split}" for split, count in data["splits"].items())
    for key in ("machine", "versions", "command"):
        print(f"{key:10}{report[key]}")
    print(f"{'data':10}shape of {data['dataset']}: {clips} clips, {data['bytes'] / 1e9:.2f} GB, in train ", end="")
    print(f"{data['tokens'] / data['clips']:.1f} of {data['padded_to']} tokens are real")


def _measure(case: measure.Case, options: argparse.Namespace, labels: np.ndarray, report: dict[str, Any]) -> None:
    """Take every measurement, and print and write what is there: the rest may take long."""

    def alone(work: Callable[..., Any], *arguments: Any) -> Any:
        _write(report, options.output)
        # What is tiny says nothing of speed, so it need not wait for processes to start.
        return measure.alone(work, *arguments, here=options.tiny)

    pairs = report["losses"] = alone(measure.same_losses, case)
    apart = max(abs(theirs - ours_) / abs(theirs) for theirs, ours_ in pairs)
    losses = ", ".join(f"{theirs:.4f}" for theirs, _ in pairs)
    print(f"{'same work':10}the losses of the first {len(pairs)} updates, {losses}, agree within {apart:.1e}")
    upstream = report["upstream"] = alone(measure.time_upstream, case, options.epochs, options.workers)
    _print_epochs("upstream", upstream)
    upstream["derived"] = table.derive(upstream, "upstream", report["data"])
    report["ours"] = {}
    for precision in options.precision or [None]:
        extra = {"precision": precision} if precision else {}
        extra |= {"graph": False} if options.no_graph else {}
        figures = alone(measure.time_ours, case, options.our_epochs, extra)
        figures["derived"] = table.derive(figures, "ours", report["data"])
        _print_epochs(figures["precision"], figures)
        report["ours"][figures["precision"]] = figures
    _print_times(report, options.device)
    report["ulgm_ms"] = alone(measure.time_ulgm, case, labels)
    print(f"\nULGM's own work: {report['ulgm_ms']:.3f} ms a step if nothing runs beside it")
    for precision, figures in report["ours"].items():
        share = report["ulgm_ms"] / figures["derived"]["step_ms"]
        if options.device == "cuda" and not options.no_graph:
            # It runs beside the update of the weights.
            one, other = figures["ulgm_in_a_step_ms"] = alone(measure.time_steps_with_and_without_ulgm, case, precision)
            share = 1 - other / one
        print(f"{share:.2%} of a step in {precision}")
    if options.seeds_to_table:
        _print_seeds_to_table(case, options, report)
    _write(report, options.output)


def _print_epochs(side: str, figures: dict[str, Any]) -> None:
    seconds = ", ".join(f"{epoch:.3f}" for epoch in figures["train_seconds"])
    print(f"{side:10}training, s in each epoch: {seconds}", flush=True)


def _write(figures: dict[str, Any], output: Path | None) -> None:
    if output:
        output.write_text(json.dumps(figures, indent=1, default=float))


def _print_times(report: dict[str, Any], device: str) -> None:
    unit = "kernels" if device == "cuda" else "operations"
    print(f"\n{table.compared(report)}\npeak arithmetic: {report['upstream']['peak'][1]}")
    for precision, figures in report["ours"].items():
        print(f"\nours, {precision}: where a step's time goes\n{table.profile(figures['profile'], unit)}")


def _print_seeds_to_table(case: measure.Case, options: argparse.Namespace, report: dict[str, Any]) -> None:
    epochs = 2 if options.tiny else 20
    more = ["--precision", options.precision[0]] if options.precision else []
    given = (case.shape.dataset, case.data, case.encoder, case.device, case.folder / "five")
    made = report["seeds_to_table"] = ours.seeds_to_table(*given, epochs=epochs, more=more)
    print(f"\n{made['command']}\n{made['printed']}")
    print(f"from the command to its table, five seeds of {epochs} epochs: {made['seconds']:.1f} s")


def compare_quality(options: argparse.Namespace) -> None:
    """Train both on a file with each seed, and print figures and seconds side by side."""
    from registry.cli.common import seeds_of

    from . import upstream

    extra = {"precision": options.precision[0]} if options.precision else {}
    figures: dict[str, list[dict[str, Any]]] = {"upstream": [], "ours": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        given = ("mosi", options.data, options.text_encoder, options.device)
        for seed in seeds_of([options.seeds]):
            best = folder / f"upstream-{seed}.pth"
            args = upstream.arguments(*given)
            figures["upstream"].append(upstream.train(args, seed, options.workers, options.epochs, best))
            _say_last(figures, "upstream", options.output)
            figures["ours"].append(ours.train(*given, folder / "runs", seed=seed, epochs=options.epochs, **extra))
            _say_last(figures, "ours", options.output)
    rows = {"validation MAE": {side: [run["valid_mae"] for run in runs] for side, runs in figures.items()}}
    for name in ours.METRICS:
        rows[f"test {name}"] = {side: [run["test"][name] for run in runs] for side, runs in figures.items()}
    print(f"\n{'':24}{'upstream':>20}{'ours':>20}")
    for label, values in rows.items():
        print(f"{label:24}" + "".join(f"{_spread(values[side]):>20}" for side in figures))
    for part in ("train_seconds", "valid_seconds"):
        # The first epoch also pays for starting up.
        per_epoch = {side: mean(s for run in figures[side] for s in run[part][1:] or run[part]) for side in figures}
        ratio = per_epoch["upstream"] / per_epoch["ours"]
        label = part.replace("_seconds", "") + " seconds an epoch"
        print(f"{label:24}{per_epoch['upstream']:>20.2f}{per_epoch['ours']:>20.2f}   upstream / ours = {ratio:.2f}")


def _say_last(figures: dict[str, list[dict[str, Any]]], side: str, output: Path | None) -> None:
    """Print a seed's figures, and write all that are there: the rest may take hours."""
    last = figures[side][-1]
    print(f"{side} {last['seed']}: validation MAE {last['valid_mae']:.4f}, test MAE {last['test']['MAE']:.4f}")
    _write(figures, output)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _options(typed: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=list(shapes.SHAPES), help="time both on synthetic data of this shape")
    what.add_argument("--data", type=Path, help="compare figures on this feature file of CMU-MOSI")
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, help="upstream's loader processes; 4 on a GPU, its own default, else none")
    add("--precision", nargs="+", choices=PRECISIONS, help="of ours; its default if left out")
    add("--epochs", type=int, help="with --shape, upstream's, the first left out (3); with --data, most of both")
    add("--our-epochs", type=int, default=6, help="with --shape, ours, the first two left out (6)")
    add("--no-graph", action="store_true", help="ours without recorded steps")
    add("--tiny", action="store_true", help="a few short clips and a narrow BERT")
    add("--seeds-to-table", action="store_true", help="also time `benchmark run` of five seeds, 20 epochs each")
    add("--text-encoder", default="minilm", help="with --data")
    add("--seeds", default="1111-1113", help="with --data")
    add("--output", type=Path, help="write every figure to this JSON file")
    options = parser.parse_args(typed)
    options.typed = list(typed)
    if options.workers is None:
        options.workers = 4 if options.device == "cuda" else 0
    if options.shape and options.epochs is None:
        options.epochs = 3
    return options


def main(typed: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _options(sys.argv[1:] if typed is None else typed)
    if find_spec("MMSA") is None:
        raise SystemExit('upstream is the package MMSA, which is not installed: pip install -e ".[test]"')
    if options.data:
        compare_quality(options)
        return
    try:
        time_both(options)
    except measure.Different as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
