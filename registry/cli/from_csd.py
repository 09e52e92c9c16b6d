"""`benchmark data from-csd`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import InputError
from . import screen
from .common import Debug, LabelRange
from .data import data_app


@data_app.command("from-csd")
def from_csd(
    words: Annotated[Path, typer.Option(help=".csd file of time-stamped words.")],
    labels: Annotated[Path, typer.Option(help=".csd file of labelled segments; the first column is the label.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The feature file to write, a .pkl.")],
    audio: Annotated[Path | None, typer.Option(help=".csd file of audio features.")] = None,
    vision: Annotated[Path | None, typer.Option(help=".csd file of vision features.")] = None,
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Whose folds, labels and text encoder.")] = "mosi",
    folds: Annotated[
        Path | None, typer.Option(help='FILE.json of videos, {"train": […], "valid": […], "test": […]}.')
    ] = None,
    aligned: Annotated[
        bool, typer.Option("--aligned/--unaligned", help="Audio and vision by token, or as they are.")
    ] = False,
    reduction: Annotated[
        str, typer.Option(help="Of the steps in a word, or of --rate: mean, max, min, first, last.")
    ] = "mean",
    rate: Annotated[
        float | None, typer.Option(help="Unaligned: bring audio and vision to so many steps a second.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of text_bert, special tokens included.")] = 50,
    max_audio: Annotated[int, typer.Option(help="Unaligned: steps of audio of a clip.")] = 500,
    max_vision: Annotated[int, typer.Option(help="Unaligned: steps of vision of a clip.")] = 500,
    keep_empty: Annotated[
        bool, typer.Option("--keep-empty", help="Keep clips without audio or vision, with a step of zeros.")
    ] = False,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Add text_bert, ids of this encoder; when aligned, the dataset's own by default."),
    ] = None,
    label_range: LabelRange = None,
    debug: Debug = False,
) -> None:
    """Make a feature file of the CMU Multimodal SDK's computational sequences."""
    from rich.progress import Progress

    from ..data.from_sequences import from_computational_sequences, read_folds
    from ..plugins import Plugins
    from ..runs import require_file, write_file

    spec = Plugins([]).load("dataset", dataset)
    require_file(out, "--out")
    for source in (words, labels, audio, vision, folds):
        if source is not None and out.exists() and source.exists() and out.samefile(source):
            raise InputError(f"--out {out} is one of the files that are read")
    encoder = None
    if name := text_encoder or (spec.text_encoder if aligned else None):
        from ..data.text import find_text_encoder

        encoder = find_text_encoder(name)
    with Progress(console=screen.err, transient=True, disable=not screen.err.is_terminal) as bar:
        task = bar.add_task("videos", total=None)
        made = from_computational_sequences(
            words=words,
            labels=labels,
            audio=audio,
            vision=vision,
            folds=read_folds(folds) if folds else dataset,
            aligned=aligned,
            reduction=reduction,
            rate=rate,
            max_length=max_length,
            max_audio=max_audio,
            max_vision=max_vision,
            keep_empty=keep_empty,
            text_encoder=encoder,
            label_range=spec.label_range if label_range is None else label_range,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    write_file(out, made.write)
    rows = made.rows()
    for row in rows:
        if spec.splits and not folds:
            row["published"] = str(spec.splits[row["split"]])
    screen.print_table(f"{out}, {'aligned' if aligned else 'unaligned'}", rows)
    for note in made.notes:
        screen.say(f"note: {escape(note)}")
