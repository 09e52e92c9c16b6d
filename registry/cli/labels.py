"""`benchmark labels`, and `benchmark import-checkpoint`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import screen
from .common import AsJson, DataRoot, Debug, LabelRange, Plugin, RunsFolder, app


@app.command()
def labels(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a seed, or of a configuration's seeds.")],
    figure: Annotated[
        Path | None, typer.Option(help=".png, .pdf or .svg; labels-MODEL-DATASET-SEED.png here by default.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="labels-MODEL-DATASET-SEED.csv here by default.")] = None,
    epoch: Annotated[int | None, typer.Option(help="Epoch of the labels in the CSV; the best one by default.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what the labels that a hook generated did in training: a table, a figure, and a CSV of labels by clip.

    With several seeds, each has its own, and a file's name gets its seed.
    """
    from ..labels import MEANINGS, find_runs, generated_in_vain, read_labels, to_json, write_files

    found = [read_labels(run) for run in find_runs(folder)]
    files = write_files(found, figure=figure, csv=csv, epoch=epoch)
    if as_json:
        sys.stdout.write(to_json(found, files) + "\n")
        return
    for generated in found:
        screen.print_table(generated.title, generated.movement_rows())
        if len(generated.shown_epochs) < len(generated.epochs):
            whole = generated.run.folder / "label_movement.csv"
            screen.out.print(
                f"all {len(generated.epochs)} epochs: {escape(str(whole))}", highlight=False, soft_wrap=True
            )
        if generated_in_vain(generated.run):
            screen.out.print("no label had moved before the best epoch, whose weights have seen human labels only")
    for column in found[0].movement:
        if column in MEANINGS:
            screen.say(f"{column}: {MEANINGS[column]}")
    for written in files:
        screen.say(f"figure: {escape(str(written.figure))}")
        screen.say(f"labels by clip: {escape(str(written.csv))}")


@app.command("import-checkpoint")
def import_checkpoint(
    model: Annotated[str, typer.Argument(help="The model that the checkpoint is of.")],
    file: Annotated[Path, typer.Argument(help="Upstream's .pth file.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="What it was trained on.")] = "mosi",
    data: Annotated[
        Path | None,
        typer.Option(help="Feature file, or the name of a registered one; with one the checkpoint is tested."),
    ] = None,
    data_root: DataRoot = None,
    text_encoder: Annotated[str | None, typer.Option(help="Its text encoder: minilm, a hub name or a folder.")] = None,
    label_range: LabelRange = None,
    runs: RunsFolder = Path("runs"),
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Make a run folder of another project's checkpoint."""
    from ..checkpoints import import_checkpoint as make_run

    done = make_run(
        model,
        file,
        dataset,
        data=data,
        data_root=data_root,
        text_encoder=text_encoder,
        label_range=label_range,
        runs=runs,
        plugins=plugin,
    )
    if done.metrics:
        screen.print_table(
            f"{model} from {file.name} on {dataset}, test split",
            [{"metric": name, "value": f"{value:.4f}"} for name, value in done.metrics.items()],
        )
    screen.say(f"run folder: {escape(str(done.folder))}")
