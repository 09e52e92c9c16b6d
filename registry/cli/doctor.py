"""`benchmark doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.markup import escape

from . import screen
from .common import AsJson, Debug, RunsFolder, app


@app.command()
def doctor(runs: RunsFolder = Path("runs"), as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what this installation and this machine have, and what to do about what they lack."""
    from ..doctor import diagnose

    found = diagnose(runs)
    broken = [finding for finding in found if finding.is_broken]
    if as_json:
        import json

        sys.stdout.write(json.dumps([vars(finding) for finding in found], indent=2) + "\n")
    else:
        section, wide = "", max(len(finding.name) for finding in found if len(finding.name) < 30)
        for finding in found:
            if finding.section != section:
                section = finding.section
                screen.say(f"[bold]{section}[/]")
            mark = "[red]✗[/]" if finding.is_broken else "[yellow]![/]" if finding.advice else " "
            screen.say(f"{mark} {escape(finding.name.ljust(wide))}  {escape(finding.value)}")
            if finding.advice:
                screen.say(f"  {' ' * wide}  [italic]→ {escape(finding.advice)}[/]")
        screen.say(f"{len(broken)} broken: see ✗ above" if broken else "what the benchmark needs is there")
    if broken:
        raise typer.Exit(1)
