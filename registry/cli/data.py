"""`benchmark data …`: the commands that make feature files and look at them."""

from __future__ import annotations

import typer

from . import common

app = typer.Typer(help="Make feature files.", no_args_is_help=True)
common.app.add_typer(app, name="data")
