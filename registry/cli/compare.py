"""`benchmark compare` and `benchmark table`: models side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..errors import InputError
from . import completion, screen
from .common import (
    AudioFeatures,
    Data,
    DataRoot,
    Dataset,
    Debug,
    Deterministic,
    Device,
    Encoder,
    Epochs,
    Graph,
    LabelRange,
    Metrics,
    OfDataset,
    OutFile,
    Plugin,
    Precision,
    Published,
    Reference,
    RunsFolder,
    Seeds,
    TextFeatures,
    Track,
    VisionFeatures,
    app,
    features_of,
    interrupted,
    names_of,
    overrides_of,
    say_where_tracked,
    seeds_of,
)

if TYPE_CHECKING:
    from .. import side_by_side
    from ..comparison import Comparison
    from ..contract import PublishedResult

FORMATS = ("table", "markdown", "latex", "html", "csv", "json")
SUFFIXES = {".md": "markdown", ".tex": "latex", ".html": "html", ".csv": "csv", ".json": "json"}
_FIGURE = 30
"""Characters of the longest figure with its interval: what is longer may be broken in a wide table."""

Format = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", help="table, markdown, latex, html, csv or json; table, or what --out ends in, by default."
    ),
]


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Option(
            "--models",
            "-m",
            help="Names with commas between, each NAME, NAME+HOOK, or NAME:KEY=VALUE:… with settings of its own; "
            "all is every model. The others are compared with the first.",
            autocompletion=completion.models,
        ),
    ],
    also_with: Annotated[
        list[str],
        typer.Option(
            "--with",
            help="Hooks to add to each model that takes them, as heads,ulgm.",
            autocompletion=completion.hooks,
        ),
    ] = [],
    dataset: Dataset = "demo",
    data: Data = None,
    data_root: DataRoot = None,
    text_features: TextFeatures = None,
    audio_features: AudioFeatures = None,
    vision_features: VisionFeatures = None,
    text_encoder: Encoder = None,
    seeds: Seeds = ["1111-1115"],
    preset: Annotated[str | None, typer.Option(help="Published hyper-parameters, for the models that have it.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="KEY=VALUE for the models that have the key; repeatable.")
    ] = [],
    epochs: Epochs = None,
    label_range: LabelRange = None,
    device: Device = "auto",
    precision: Precision = None,
    graph: Graph = True,
    deterministic: Deterministic = False,
    runs: RunsFolder = Path("runs"),
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", help="Models to train at once, in processes that share the cores.")
    ] = 1,
    track: Track = None,
    metrics: Metrics = None,
    published: Published = False,
    form: Format = None,
    target: OutFile = None,
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Train and test the models that are not yet, over seeds, and print them side by side."""
    from ..compare_models import compare as compare_models
    from ..progress import make_watcher

    form = _checked_format(form, target)
    results = _published_results(plugin) if published else None
    overrides = overrides_of(settings, epochs)
    say_where_tracked(track, runs)
    try:
        with make_watcher(screen.err) as watcher, redirect_stdout(sys.stderr):
            comparison = compare_models(
                models,
                dataset,
                also_with=[hook for given in also_with for hook in given.split(",")],
                data=data,
                data_root=data_root,
                features=features_of(text_features, audio_features, vision_features),
                text_encoder=text_encoder,
                seeds=seeds_of(seeds),
                preset=preset,
                config=overrides,
                label_range=label_range,
                device=device,
                precision=precision,
                graph=graph,
                deterministic=deterministic,
                runs=runs,
                plugins=plugin,
                metrics=names_of(metrics),
                track=track,
                watcher=watcher,
                jobs=jobs,
                before=lambda name, number, of: watcher.note(f"model {number} of {of}: {name}"),
            )
    except KeyboardInterrupt:
        raise interrupted() from None
    _show_comparison(comparison, form, target, results)
    if any(row.note for row in comparison.rows):
        raise typer.Exit(1)


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(metavar="RUNS…", help="Run folders, or folders above them.")],
    reference: Reference = None,
    dataset: OfDataset = None,
    metrics: Metrics = None,
    published: Published = False,
    form: Format = None,
    target: OutFile = None,
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Print the runs in folders side by side, as `compare` does; a configuration's seeds make one row.

    A run that failed, or whose files are broken, is said in its row, and makes the exit code 1.
    """
    from ..comparison import collect

    form = _checked_format(form, target)
    results = _published_results(plugin) if published else None
    comparison = collect(folders, reference, dataset=dataset, metrics=names_of(metrics), plugins=plugin)
    _show_comparison(comparison, form, target, results)
    if any(row.note for row in comparison.rows):
        raise typer.Exit(1)


def _checked_format(form: str | None, target: Path | None) -> str:
    """Return the format that is wanted, by its name or the file's; what cannot be written is said before training."""
    from ..errors import unknown
    from ..runs import require_file

    if form is None:
        form = "table" if target is None else SUFFIXES.get(target.suffix.lower(), "")
    if target is not None and form in ("", "table"):
        raise InputError(f"--out needs --format {', '.join(FORMATS[1:])}, or a file that ends in {', '.join(SUFFIXES)}")
    if form not in FORMATS:
        raise InputError(unknown("format", form, FORMATS))
    if target is not None:
        require_file(target, "--out")
        if not target.absolute().parent.is_dir():
            raise InputError(f"--out {target} is in a folder that does not exist")
    return form


def _published_results(plugin: Sequence[str]) -> list[PublishedResult]:
    """Return what others have published, read before anything is trained to stand beside it."""
    from ..side_by_side import published_results

    return published_results(plugin)


def _show_comparison(
    comparison: Comparison, form: str, target: Path | None, published: list[PublishedResult] | None
) -> None:
    """Print or write a comparison; `published` is None where it was not asked for."""
    from ..forms import render
    from ..runs import write_file
    from ..side_by_side import BEST, of_interest, tables_of

    results = of_interest(comparison, published or [])
    if published is not None and not results:
        screen.err.print(f"nothing is published of these models on {comparison.dataset}", highlight=False)
    if form != "table":
        text = render(comparison, form, results, target.stem if target else "")
        if target is None:
            sys.stdout.write(text)
        else:
            write_file(target, lambda path: path.write_text(text, "utf-8", errors="replace"))
            screen.tell(f"written to {escape(str(target))}")
        return
    for made in tables_of(comparison, results):
        _print_in_pieces(made)
        for note in made.notes:
            if screen.out.is_terminal or not note.startswith(BEST):  # a pipe has no bold
                screen.out.print(escape(note), highlight=False)
        screen.out.print()


def _print_in_pieces(table: side_by_side.Table) -> None:
    """Print a table in as many pieces as the terminal's width asks for."""
    from ..forms import split

    pieces = split(table, lambda piece: screen.table_of(piece, fold=True, unbroken=_FIGURE)[1] <= screen.out.width)
    for number, piece in enumerate(pieces):
        screen.print_table(f"{table.title}, continued" if number else table.title, piece, unbroken=_FIGURE)
