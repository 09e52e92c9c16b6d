"""The application that commands join, and the options that several of them have."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..errors import InputError
from . import completion, screen

app = typer.Typer(
    help="Train and test models of multimodal sentiment analysis under one protocol.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Plugin = Annotated[
    list[str], typer.Option("--plugin", help="FILE.py or module of a plugin that is not packaged; repeatable.")
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A model, or MODEL+HOOK; see `benchmark list models`.",
        autocompletion=completion.model,
    ),
]
Hooks = Annotated[
    list[str],
    typer.Option("--hook", help="A training hook to add; repeatable.", autocompletion=completion.hooks),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset", "-d", help="A dataset; see `benchmark list datasets`.", autocompletion=completion.dataset
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Feature file in MMSA's pickle layout, or the name of a registered one; the registered one that fits the "
        "model by default."
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of registered files; $MMSA_DATA or the user's own by default.")
]
TextFeatures = Annotated[Path | None, typer.Option(help="Another file for text, joined to the data by clip id.")]
AudioFeatures = Annotated[Path | None, typer.Option(help="Another file for audio, joined likewise.")]
VisionFeatures = Annotated[Path | None, typer.Option(help="Another file for vision, joined likewise.")]
Encoder = Annotated[str | None, typer.Option(help="minilm, a hub name or a folder; the dataset's own by default.")]
Seeds = Annotated[list[str], typer.Option("--seeds", "-s", help="1111-1115 or 1,2 or one number; repeatable.")]
Epochs = Annotated[int | None, typer.Option(help="Most epochs to train; the same as --set epochs=N.")]
LabelRange = Annotated[float | None, typer.Option(help="Labels lie in ± this; the dataset's own by default.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Precision = Annotated[
    str | None,
    typer.Option(help="fp32, tf32 (GPU) or bf16 (a text encoder that is trained); tf32 on a GPU, fp32 on a CPU."),
]
Graph = Annotated[bool, typer.Option("--graph/--no-graph", help="Record steps on a GPU as CUDA graphs.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same to the last bit each time, on a GPU too; slower there.")
]
Track = Annotated[str | None, typer.Option(help="tensorboard: also write event files, while it trains.")]
RunsFolder = Annotated[Path, typer.Option(help="Folder that holds run folders.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Metrics = Annotated[str | None, typer.Option(help="Metrics to show besides MAE, with commas between; all by default.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file, not to the terminal.")]
Published = Annotated[bool, typer.Option("--published", help="Add what others have published of these models.")]
Reference = Annotated[str | None, typer.Option(help="The row that the others are compared with; the first by default.")]
OfDataset = Annotated[str | None, typer.Option("--dataset", "-d", help="Whose runs are meant, of several.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        screen.out.print(f"selfmm-plugin {version('selfmm-plugin')}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def interrupted() -> typer.Exit:
    screen.tell("interrupted; finished seeds and kept epochs stay, and the same command goes on from there")
    return typer.Exit(130)


def say_where_tracked(track: str | None, runs: Path) -> None:
    """Say how to look on, where tracking was asked for."""
    if track is not None:
        from ..tracking import FOLDER, require_tracker

        require_tracker(track)
        screen.tell(f"to look on: {escape(shlex.join(['tensorboard', '--logdir', str(runs / FOLDER)]))}")


def overrides_of(settings: Sequence[str], epochs: int | None) -> dict[str, Any]:
    """Return the keys of `--set` and `--epochs`."""
    from ..config import parse_settings

    overrides = parse_settings(settings)
    if epochs is not None:
        if "epochs" in overrides:
            raise InputError("--epochs and --set epochs=… say the same thing; give one")
        overrides["epochs"] = epochs
    return overrides


def features_of(text: Path | None, audio: Path | None, vision: Path | None) -> dict[str, Path]:
    """Return the files of `--text-features`, `--audio-features` and `--vision-features` by modality."""
    given = {"text": text, "audio": audio, "vision": vision}
    return {name: path for name, path in given.items() if path is not None}


def seeds_of(texts: Iterable[str]) -> list[int]:
    """Read `1111-1115`, `1,2` and single numbers."""
    seeds: list[int] = []
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        first, dash, last = text.partition("-")
        if (
            len(text) > 40
            or not first.isdecimal()
            or (dash and not last.isdecimal())
            or (dash and int(last) < int(first))
        ):
            raise InputError(f"--seeds takes numbers and ranges, as 1111-1115 or 1,2, got {text!r}")
        if dash and int(last) - int(first) >= 1000:
            raise InputError(f"--seeds {text}: more than 1000 seeds in one range")
        seeds += range(int(first), int(last if dash else first) + 1)
    return seeds


def names_of(text: str | None) -> list[str]:
    """Read names with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []
