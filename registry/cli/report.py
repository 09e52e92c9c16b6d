"""`benchmark report`: a page of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import screen
from .common import DataRoot, Debug, Metrics, OfDataset, Plugin, Published, Reference, app, names_of


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUNS…", help="Run folders, or folders above them.")],
    target: Annotated[Path, typer.Option("--out", "-o", help="The page; what is there is replaced.")] = Path(
        "report.html"
    ),
    reference: Reference = None,
    dataset: OfDataset = None,
    metrics: Metrics = None,
    published: Published = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The feature file of the runs, for the clips' texts; demo needs none, nor do registered data."
        ),
    ] = None,
    data_root: DataRoot = None,
    figures: Annotated[Path | None, typer.Option(help="Folder that gets each figure as a file, for a paper.")] = None,
    figure_format: Annotated[str, typer.Option(help="Of those files: pdf, png or svg.")] = "pdf",
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Write one page of the runs in folders: tables, figures, clips and settings, with everything in it.

    A run that failed, or whose files are broken, is said on the page, and makes the exit code 1.
    """
    from ..reporting import report as make_report

    with screen.err.status("") as status:
        comparison = make_report(
            folders,
            target,
            reference=reference,
            dataset=dataset,
            metrics=names_of(metrics),
            published=published,
            data=data,
            data_root=data_root,
            figures=figures,
            figure_format=figure_format,
            plugins=plugin,
            tell=lambda what: status.update(escape(what)),
        )
    screen.tell(f"written to {escape(str(target))}")
    if figures is not None:
        screen.tell(f"figures in {escape(str(figures))}")
    for row in comparison.rows:
        if row.note:
            screen.complain(f"{row.name}: {row.note}")
    if any(row.note for row in comparison.rows):
        raise typer.Exit(1)
