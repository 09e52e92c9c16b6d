"""`benchmark push` and `benchmark pull`: finished runs on the Hugging Face hub."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import screen
from .common import Debug, Plugin, app


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of one seed.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is seen by you only.")] = False,
    with_predictions: Annotated[
        bool, typer.Option("--with-predictions", help="Send ids, labels and predictions of the test split too.")
    ] = False,
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Send a finished run to the Hugging Face hub: weights, settings, metrics, and a model card."""
    from ..hub import push as send
    from ..prediction import find_run

    with redirect_stdout(sys.stderr):
        url = send(find_run(folder, plugins=plugin), repo, private=private, with_predictions=with_predictions)
    screen.say(f"sent to {escape(url)}")


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="USER/NAME on the hub, or USER/NAME@REVISION.")],
    target: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to make; the hub's local cache by default.")
    ] = None,
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Fetch a run from the Hugging Face hub: weights, JSON and tables; nothing in it is run."""
    from ..hub import pull as fetch

    with redirect_stdout(sys.stderr):
        run = fetch(repo, target, plugins=plugin)
    title = f"{run.settings['model']} on {run.settings['dataset']}, seed {run.settings['seed']}, test split"
    if run.metrics:
        screen.print_table(title, [{"metric": n, "value": f"{v:.4f}"} for n, v in run.metrics.items()])
    screen.say(f"run folder: {escape(str(run.folder))}")
