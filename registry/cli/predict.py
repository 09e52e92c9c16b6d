"""`benchmark predict` and `benchmark missing`: finished runs on other clips."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import InputError
from . import screen
from .common import Data, DataRoot, Debug, Device, Metrics, OutFile, Plugin, app, names_of, seeds_of

ROWS = 20
"""Predictions that are printed; a file has them all."""
DEFAULT = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"

TextEncoder = Annotated[
    str | None, typer.Option("--text-encoder", help="Where the run's text encoder lies now, if its name does not say.")
]


@app.command()
def predict(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of one seed.")],
    features: Annotated[
        Path | None,
        typer.Argument(
            help="Feature file, with or without labels and splits, or the name of a registered one; the run's own data "
            "by default, if it is registered or the dataset makes it."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, valid or test; all that are there by default.")] = None,
    target: OutFile = None,
    data_root: DataRoot = None,
    text_encoder: TextEncoder = None,
    device: Device = "auto",
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Say the sentiment of clips by a finished run's model: of a feature file, or of a single video's features."""
    from ..prediction import CLIPS, find_run, metrics_of, require_format, write_predictions
    from ..prediction import predict as predict_clips
    from ..progress import make_watcher

    if target is not None:
        require_format(target)
    with make_watcher(screen.err) as watcher, redirect_stdout(sys.stderr):
        run = find_run(folder, plugins=plugin)
        table = predict_clips(
            run,
            features,
            split=split,
            data_root=data_root,
            text_encoder=text_encoder,
            device=device,
            watcher=watcher,
        )
    metrics = metrics_of(run, table)
    if target is not None:
        write_predictions(run, table, target)
    else:
        rows = [
            {str(name): value if isinstance(value, str) else _figure(value) for name, value in row.items()}
            for row in table.head(ROWS).to_dict("records")
        ]
        screen.print_table(f"{run.settings['model']}, seed {run.settings['seed']}", rows)
        more = f"{ROWS} of {len(table)} clips; " if len(table) > ROWS else ""
        screen.say(f"{more}-o FILE.csv or FILE.json writes them to a file")
    if metrics:
        splits = {name: "value" if name == CLIPS else name for name in metrics}
        screen.print_table(
            "metrics",
            [
                {"metric": name, **{splits[of]: f"{metrics[of][name]:.4f}" for of in metrics}}
                for name in next(iter(metrics.values()))
            ],
        )
    if target is not None:
        screen.say(f"{len(table)} predictions written to {escape(str(target))}")


def _figure(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"


@app.command()
def missing(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a seed, or of a configuration's seeds.")],
    data: Data = None,
    data_root: DataRoot = None,
    rates: Annotated[str, typer.Option(help="Rates of what is missing, from 0 to 1, with commas between.")] = DEFAULT,
    seeds: Annotated[list[str], typer.Option("--seeds", "-s", help="Seeds of what is missing: 1-3 or 1,2.")] = ["1-3"],
    kind: Annotated[
        str, typer.Option(help="steps: words and steps are missing; modality: whole modalities, of which one stays.")
    ] = "steps",
    modalities: Annotated[
        str | None, typer.Option(help="What can be missing, as text or audio,vision; all that is read by default.")
    ] = None,
    metrics: Metrics = None,
    target: Annotated[Path | None, typer.Option("--out", "-o", help="Write every value to this .csv.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the curves: .png, .pdf or .svg.")] = None,
    text_encoder: TextEncoder = None,
    device: Device = "auto",
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Test finished runs while words, steps or whole modalities of the test clips are missing."""
    from ..missing import evaluate_missing, require_files, write_files
    from ..progress import make_watcher

    require_files(figure, target)
    with make_watcher(screen.err) as watcher, redirect_stdout(sys.stderr):
        found = evaluate_missing(
            folder,
            data,
            rates=_numbers(rates),
            seeds=seeds_of(seeds),
            kind=kind,  # type: ignore[arg-type]  # checked there
            modalities=names_of(modalities),
            metrics=names_of(metrics),
            data_root=data_root,
            text_encoder=text_encoder,
            device=device,
            plugins=plugin,
            watcher=watcher,
            before=watcher.note,
        )
    write_files(found, figure=figure, csv=target)
    screen.print_in_pieces(found.title, found.rows())
    screen.say(f"mean ± standard deviation over {found.counted}; area: under the curve, over the width of the rates")
    for name, path in (("figure", figure), ("values", target)):
        if path is not None:
            screen.say(f"{name}: {escape(str(path))}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--rates takes numbers with commas between, as 0,0.3,0.6, got {text!r}") from None
