"""`benchmark list`, `describe` and `check`: what is registered."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import BenchmarkError, InputError
from . import completion, screen
from .common import AsJson, Debug, Plugin, app

if TYPE_CHECKING:
    from ..plugins import Entry

KINDS = {"models": "model", "datasets": "dataset", "hooks": "hook", "published": "published"}


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="models, datasets, hooks or published (results)")] = "models",
    check: Annotated[bool, typer.Option("--check", help="Import each, and show its summary or its failure.")] = False,
    plugin: Plugin = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what is registered, without importing it."""
    from ..plugins import Plugins

    if kind not in KINDS:
        raise InputError(f"benchmark list takes {', '.join(KINDS)}, got {kind!r}")
    plugins = Plugins(plugin)
    rows: list[dict[str, Any]] = []
    broken = False
    if check:
        for entry, found in plugins.check(KINDS[kind]):
            failed = isinstance(found, BenchmarkError)
            broken |= failed
            rows.append(
                _row(entry, status="failed", summary="") if failed else _row(entry, status="ok", summary=found.summary)
            )
            if failed:
                screen.complain(str(found))
    else:
        rows = [_row(entry) for entry in plugins.entries(KINDS[kind])]
    if as_json:
        import json

        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    elif rows:
        screen.print_table(kind, [{key: str(value) for key, value in row.items()} for row in rows])
    else:
        screen.out.print(f"no {kind} are registered")
    if broken:
        raise typer.Exit(1)


def _row(entry: Entry, **more: str) -> dict[str, str]:
    return {"name": entry.name, "distribution": entry.distribution, "version": entry.version, **more}


@app.command()
def describe(
    model: Annotated[str, typer.Argument(help="A model, or MODEL+HOOK.", autocompletion=completion.model)],
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Show a model's paper, citation, presets and every config key."""
    from ..plugins import Plugins
    from ..tables import config_tables

    name, spec, hooks = Plugins(plugin).load_model(model)
    screen.out.print(f"[bold]{escape(name)}[/]: {escape(spec.summary)}", highlight=False)
    for label, value in (("paper", spec.citation), ("at", spec.url), ("hooks", ", ".join(h.name for h in hooks))):
        if value:
            screen.out.print(f"{label}: {escape(value)}", highlight=False)
    presets = [f"{preset} ({', '.join(values)})" for preset, values in spec.presets.items()]
    if presets:
        default = next(iter(spec.presets))
        screen.out.print(f"presets: {escape('; '.join(presets))}; {default} is the default", highlight=False)
    for title, rows in config_tables(spec, hooks).items():
        screen.print_table(title, rows)


@app.command()
def check(
    target: Annotated[
        str, typer.Argument(help="A registered model, or the FILE.py of one.", autocompletion=completion.model)
    ],
    debug: Debug = False,
) -> None:
    """Check a model against the contract, for plugin authors."""
    from ..plugins import Plugins
    from ..testing import inspect_model

    is_file = target.endswith(".py")
    plugins = Plugins([target] if is_file else [])
    entries = plugins.entries("model")
    names = [entry.name for entry in entries if entry.target == target] if is_file else [target]
    if not names:
        raise InputError(f"{target} holds no model")
    failed = False
    for name in names:
        _, spec, hooks = plugins.load_model(name)
        screen.out.print(f"[bold]{escape(spec.name)}[/]", highlight=False)
        for result in inspect_model(spec, hooks):
            failed |= result.fault is not None
            mark = "[red]fault[/]" if result.fault else "[green]ok[/]   "
            detail = f": {escape(result.fault)}" if result.fault else ""
            screen.say(f"  {mark} {escape(result.name)}{detail}")
    if failed:
        raise typer.Exit(1)
