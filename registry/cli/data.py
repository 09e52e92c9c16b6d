"""`benchmark data`: feature files that are registered once, and what is in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..errors import BenchmarkError, InputError
from . import screen
from .common import AsJson, DataRoot, Debug, LabelRange, Plugin, app

if TYPE_CHECKING:
    from ..contract import DatasetSpec
    from ..data.inspection import Inspection
    from ..data.mapped import Told
    from ..data.store import Progress, Registered
    from ..plugins import Plugins

data_app = typer.Typer(
    help="Register feature files once, and look at what is in them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")

DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="A dataset; see `benchmark list datasets`.")]


@data_app.command()
def add(
    dataset: DatasetName,
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Feature files in MMSA's pickle layout.")],
    label_range: LabelRange = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take a file with the name of a published one and other content.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of another content of the same name.")
    ] = False,
    data_root: DataRoot = None,
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Check files and register them, so that runs find them without --data, also when the files are gone."""
    from ..data.feature_file import size
    from ..data.store import Store
    from ..plugins import Plugins

    plugins, store = Plugins(plugin), Store(data_root)
    spec, others = plugins.load("dataset", dataset), _datasets(plugins)
    failed = False
    for file in files:
        try:
            with _progress(file.name) as progress:
                found, is_new = store.add(
                    spec,
                    file,
                    label_range=label_range,
                    unverified=unverified,
                    replace=replace,
                    others=others,
                    progress=progress,
                )
        except InputError as error:
            screen.complain(str(error))
            failed = True
            continue
        for note in found.notes:
            screen.tell(escape(f"{file.name}: {note}"))
        state = "registered" if is_new else "registered already, nothing to do"
        same = "" if found.name == file.name else f" as {found.name}"
        kind = "aligned" if found.aligned else "unaligned"
        screen.say(
            f"{escape(file.name)}: {state}{escape(same)}: {kind}, {_verdict(found)}; {size(found.size)} at "
            f"{escape(str(found.path))}"
        )
    if failed:
        raise typer.Exit(2)


@data_app.command("list")
def list_(
    data_root: DataRoot = None,
    plugin: Plugin = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the registered files, and the datasets that have none."""
    from ..data.feature_file import size
    from ..data.splits import SPLITS
    from ..data.store import Store
    from ..plugins import Plugins

    store = Store(data_root)
    files = store.files()
    having = {file.dataset for file in files}
    without = [spec.name for spec in _datasets(Plugins(plugin)) if not spec.generate and spec.name not in having]
    if as_json:
        shown = {"root": str(store.root), "files": [file.as_dict() for file in files], "without": without}
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return
    if files:
        rows = [
            {
                "dataset": file.dataset,
                "name": file.name,
                "kind": "?" if file.fault else "aligned" if file.aligned else "unaligned",
                "train / valid / test": " / ".join(str(file.clips.get(split, "?")) for split in SPLITS),
                "size": size(file.size),
                "published": "cannot be used" if file.fault else "verified" if file.verified else "no",
            }
            for file in files
        ]
        screen.print_table(f"registered in {store.root}", rows)
    else:
        screen.say(f"nothing is registered in {escape(str(store.root))}")
    for file in files:
        if file.fault:
            screen.complain(file.fault)
    if without:
        screen.say(f"nothing yet of {', '.join(map(escape, without))}: `benchmark data get NAME` says where to find it")


@data_app.command()
def remove(
    dataset: DatasetName,
    name: Annotated[str, typer.Argument(help="As `benchmark data list` shows it, with or without its suffix.")],
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Remove a registered file; the file that it was made of is not touched."""
    from ..data.store import Store

    removed = Store(data_root).remove(dataset, name)
    screen.say(f"removed {escape(str(removed.path))}")


@data_app.command()
def get(dataset: DatasetName, plugin: Plugin = [], debug: Debug = False) -> None:
    """Say where a dataset's files are published, and how to register them; nothing is downloaded."""
    from ..plugins import Plugins

    spec = Plugins(plugin).load("dataset", dataset)
    if spec.generate:
        screen.say(f"{escape(dataset)} makes its own data: benchmark run -d {escape(dataset)} needs no file")
        return
    screen.say(f"{escape(spec.summary)}")
    if spec.published_at:
        screen.say(f"published by its authors at {escape(spec.published_at)}; nothing is downloaded here")
    if spec.sha256:
        screen.print_table("published files", [{"file": n, "SHA-256": digest} for n, digest in spec.sha256.items()])
    else:
        screen.say("no file's SHA-256 is known: any file is taken, once it has been checked")
    for name in spec.sha256 or ["FILE"]:
        more = "" if spec.label_range else " --label-range 3"
        screen.say(f"then type: benchmark data add {escape(dataset)} {escape(name)}{more}")


@data_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Feature file in MMSA's pickle layout.")],
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="What it is meant to be; known of a published file.")
    ] = None,
    label_range: LabelRange = None,
    plugin: Plugin = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what is in a feature file, and every fault of it; nothing is written. Exit code 2 where it has faults."""
    from ..data.inspection import inspect_feature_file
    from ..plugins import Plugins

    plugins = Plugins(plugin)
    if dataset is not None:
        plugins.load("dataset", dataset)
    found = inspect_feature_file(file, _datasets(plugins), dataset=dataset, label_range=label_range)
    if as_json:
        from ..runs import finite

        sys.stdout.write(json.dumps(finite(found.as_dict()), indent=2) + "\n")
    else:
        _show(found)
    if found.faults:
        raise typer.Exit(2)


def _datasets(plugins: Plugins) -> list[DatasetSpec]:
    """Return every dataset that can be imported."""
    return [spec for _, spec in plugins.check("dataset") if not isinstance(spec, BenchmarkError)]


def _verdict(file: Registered) -> str:
    return "the published file (SHA-256 verified)" if file.verified else "not a published file"


def _show(found: Inspection) -> None:
    from ..data.feature_file import size
    from ..data.splits import SPLITS

    verdict = f"the published {found.published}" if found.published else "no published file that is known"
    screen.say(f"[bold]{escape(found.path)}[/]: {size(found.size)}, {'aligned' if found.aligned else 'unaligned'}")
    screen.say(f"SHA-256 {found.sha256}: {escape(verdict)}")
    splits = {name: found.splits[name] for name in SPLITS if name in found.splits}
    keys = list(dict.fromkeys(key for split in splits.values() for key in split.keys))
    rows = []
    for key in keys:
        shapes = {name: split.keys.get(key) for name, split in splits.items()}
        first = next(shape for shape in shapes.values() if shape)
        held = [shape.bytes for shape in shapes.values() if shape and shape.bytes is not None]
        rows.append(
            {
                "key": key,
                **{name: "×".join(map(str, shape.shape)) if shape else "none" for name, shape in shapes.items()},
                "type": first.type,
                "memory": size(sum(held)) if held else "",
                "read": "yes" if first.is_read else "ignored",
            }
        )
    if rows:
        screen.print_table("what is in it", rows)
    _show_lengths({name: {**split.lengths, "raw_text": split.characters} for name, split in splits.items()})
    rows = [
        {
            "task, split": f"{task} {name}",
            "mean": f"{labels.mean:.3f}",
            "sd": f"{labels.sd:.3f}",
            "from": f"{labels.low:.2f}",
            "to": f"{labels.high:.2f}",
            f"from {labels.edges[0]:g} to {labels.edges[1]:g}": f"|{labels.bars}|",
        }
        for task in "MTAV"
        for name, split in splits.items()
        if (labels := split.labels.get(task))
    ]
    if rows:
        screen.print_table("labels", rows)
    if (train := splits.get("train")) and train.sample is not None:
        sample = train.sample if len(train.sample) <= 80 else f"{train.sample[:79]}…"
        screen.say(f"first raw_text: {escape(repr(sample))}")
    for note in found.notes:
        screen.say(f"[yellow]note:[/] {escape(note)}")
    for fault in found.faults:
        screen.say(f"[bold red]fault:[/] {escape(fault)}")
    screen.say({0: "no faults", 1: "1 fault"}.get(len(found.faults), f"{len(found.faults)} faults"))


def _show_lengths(by_split: dict[str, dict[str, tuple[int, float, int] | None]]) -> None:
    names = list(dict.fromkeys(name for lengths in by_split.values() for name, found in lengths.items() if found))
    rows = []
    for name in names:
        of = {"text": "tokens of text", "raw_text": "characters of raw_text"}.get(name, f"steps of {name}")
        row = {"length": of}
        for split, lengths in by_split.items():
            found = lengths.get(name)
            row[split] = f"{found[0]} / {found[1]:g} / {found[2]}" if found else ""
        rows.append(row)
    if rows:
        screen.print_table("lengths, smallest / median / largest", rows)


@contextmanager
def _progress(name: str) -> Iterator[Progress | None]:
    """Give what shows progress with a file as a bar on a terminal; None where there is none."""
    if not screen.err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen.err, transient=True) as bars:

        def begin(what: str, size: int) -> Told:
            for task in bars.task_ids:
                bars.remove_task(task)
            task = bars.add_task(f"{name}: {what}", total=size or None)
            return lambda done: bars.advance(task, done)

        yield begin
