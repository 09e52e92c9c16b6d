"""The command `benchmark`: arguments in, `registry`'s functions, tables and messages out."""

from __future__ import annotations

import io
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import BenchmarkError, InputError

if TYPE_CHECKING:
    from . import side_by_side
    from .benchmark import Result
    from .comparison import Comparison
    from .contract import PublishedResult
    from .plugins import Entry

app = typer.Typer(
    help="Train and test models of multimodal sentiment analysis under one protocol.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# A pipe has no width; rich would fold tables to 80 columns.
out = Console(width=None if "COLUMNS" in os.environ or (sys.stdout and sys.stdout.isatty()) else 120)
err = Console(stderr=True)
KINDS = {"models": "model", "datasets": "dataset", "hooks": "hook", "published": "published"}
FORMATS = ("table", "markdown", "latex", "html", "csv", "json")
SUFFIXES = {".md": "markdown", ".tex": "latex", ".html": "html", ".csv": "csv", ".json": "json"}
_FIGURE = 30
"""Characters of the longest figure with its interval: what is longer may be broken in a wide table."""
SMALL_TABLE = 10
"""A run's tables of at most this many rows are printed."""

Plugin = Annotated[
    list[str], typer.Option("--plugin", help="FILE.py or module of a plugin that is not packaged; repeatable.")
]
Dataset = Annotated[str, typer.Option("--dataset", "-d", help="A dataset; see `benchmark list datasets`.")]
Data = Annotated[Path | None, typer.Option(help="Feature file in MMSA's pickle layout.")]
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
RunsFolder = Annotated[Path, typer.Option(help="Folder that holds run folders.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"selfmm-plugin {version('selfmm-plugin')}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error is one sentence and an exit code: 2 bad input, 1 anything else."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a run must not end with a sign that a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            app()  # exits by itself, with 2 where the command line is not one
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, BenchmarkError):
            _complain(str(error))
            sys.exit(error.exit_code)
        _complain(f"{type(error).__name__}: {error} (--debug shows where)")
        sys.exit(1)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    err.print(f"[yellow]warning:[/] {escape(' '.join(str(message).split()))}", highlight=False, soft_wrap=True)


def _complain(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


@app.command()
def run(
    model: Annotated[str, typer.Option("--model", "-m", help="A model, or MODEL+HOOK; see `benchmark list models`.")],
    dataset: Dataset = "demo",
    data: Data = None,
    text_encoder: Encoder = None,
    seeds: Seeds = ["1111"],
    preset: Annotated[str | None, typer.Option(help="Published hyper-parameters to start from.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file of config keys.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="KEY=VALUE; see `benchmark describe MODEL`; repeatable.")
    ] = [],
    hook: Annotated[list[str], typer.Option("--hook", help="A training hook to add; repeatable.")] = [],
    epochs: Epochs = None,
    label_range: LabelRange = None,
    device: Device = "auto",
    precision: Precision = None,
    graph: Graph = True,
    runs: RunsFolder = Path("runs"),
    plugin: Plugin = [],
    force: Annotated[bool, typer.Option("--force", help="Train again where a finished run exists.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train and test a model, once for each seed, and print its table."""
    overrides = _overrides(settings, epochs)
    seed_numbers = _seeds(seeds)
    from .benchmark import failure_log
    from .benchmark import run as run_model
    from .progress import make_watcher

    try:
        # What a plugin prints is not a result.
        with make_watcher(err) as watcher, redirect_stdout(sys.stderr):
            result = run_model(
                model,
                dataset,
                data=data,
                text_encoder=text_encoder,
                seeds=seed_numbers,
                preset=preset,
                config=overrides,
                config_file=config,
                hooks=hook,
                label_range=label_range,
                device=device,
                precision=precision,
                graph=graph,
                runs=runs,
                plugins=plugin,
                force=force,
                watcher=watcher,
            )
    except KeyboardInterrupt:
        raise _interrupted() from None
    if as_json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        _show_result(result)
    for failed in (run for run in result.runs if run.status == "failed"):
        if debug and failure_log(result.folder, failed.seed).exists():
            err.print(
                escape(failure_log(result.folder, failed.seed).read_text("utf-8")), highlight=False, soft_wrap=True
            )
    if len(result.ok) < len(result.runs):
        raise typer.Exit(1)


Format = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", help="table, markdown, latex, html, csv or json; table, or what --out ends in, by default."
    ),
]
Metrics = Annotated[str | None, typer.Option(help="Metrics to show besides MAE, with commas between; all by default.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file, not to the terminal.")]
Published = Annotated[bool, typer.Option("--published", help="Add what others have published of these models.")]


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Option(
            "--models",
            "-m",
            help="Names with commas between, each NAME, NAME+HOOK, or NAME:KEY=VALUE:… with settings of its own; "
            "all is every model. The others are compared with the first.",
        ),
    ],
    also_with: Annotated[
        list[str], typer.Option("--with", help="Hooks to add to each model that takes them, as heads,ulgm.")
    ] = [],
    dataset: Dataset = "demo",
    data: Data = None,
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
    runs: RunsFolder = Path("runs"),
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", help="Models to train at once, in processes that share the cores.")
    ] = 1,
    metrics: Metrics = None,
    published: Published = False,
    form: Format = None,
    target: OutFile = None,
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Train and test the models that are not yet, over seeds, and print them side by side."""
    from .compare_models import compare as compare_models
    from .progress import make_watcher

    form = _checked_format(form, target)
    results = _published_results(plugin) if published else None
    overrides = _overrides(settings, epochs)
    try:
        with make_watcher(err) as watcher, redirect_stdout(sys.stderr):
            comparison = compare_models(
                models,
                dataset,
                also_with=[hook for given in also_with for hook in given.split(",")],
                data=data,
                text_encoder=text_encoder,
                seeds=_seeds(seeds),
                preset=preset,
                config=overrides,
                label_range=label_range,
                device=device,
                precision=precision,
                graph=graph,
                runs=runs,
                plugins=plugin,
                metrics=_names(metrics),
                watcher=watcher,
                jobs=jobs,
                before=lambda name, number, of: watcher.note(f"model {number} of {of}: {name}"),
            )
    except KeyboardInterrupt:
        raise _interrupted() from None
    _show_comparison(comparison, form, target, results)
    if any(row.note for row in comparison.rows):
        raise typer.Exit(1)


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(metavar="RUNS…", help="Run folders, or folders above them.")],
    reference: Annotated[
        str | None, typer.Option(help="The row that the others are compared with; the first by default.")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Whose runs are meant, of several.")] = None,
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
    from .comparison import collect

    form = _checked_format(form, target)
    results = _published_results(plugin) if published else None
    comparison = collect(folders, reference, dataset=dataset, metrics=_names(metrics), plugins=plugin)
    _show_comparison(comparison, form, target, results)
    if any(row.note for row in comparison.rows):
        raise typer.Exit(1)


def _checked_format(form: str | None, target: Path | None) -> str:
    """Return the format that is wanted, by its name or the file's; what cannot be written is said before training."""
    from .errors import unknown
    from .runs import require_file

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


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _published_results(plugin: Sequence[str]) -> list[PublishedResult]:
    """Return everything that is registered, before anything is trained to stand beside it."""
    from .plugins import Plugins

    plugins = Plugins(plugin)
    specs = [plugins.load("published", entry.name) for entry in plugins.entries("published")]
    return [result for spec in specs for result in spec.results]


def _show_comparison(
    comparison: Comparison, form: str, target: Path | None, published: list[PublishedResult] | None
) -> None:
    """Print or write a comparison; `published` is None where it was not asked for."""
    from .forms import render
    from .runs import write_file
    from .side_by_side import BEST, of_interest, tables_of

    results = of_interest(comparison, published or [])
    if published is not None and not results:
        err.print(f"nothing is published of these models on {comparison.dataset}", highlight=False)
    if form != "table":
        text = render(comparison, form, results, target.stem if target else "")
        if target is None:
            sys.stdout.write(text)
        else:
            write_file(target, lambda path: path.write_text(text, "utf-8", errors="replace"))
            err.print(f"written to {escape(str(target))}", highlight=False, soft_wrap=True)
        return
    for made in tables_of(comparison, results):
        _print_in_pieces(made)
        for note in made.notes:
            if out.is_terminal or not note.startswith(BEST):  # a pipe has no bold
                out.print(escape(note), highlight=False)
        out.print()


def _print_in_pieces(table: side_by_side.Table) -> None:
    """Print a table in as many pieces as the terminal's width asks for."""
    from .forms import split

    pieces = split(table, lambda piece: _table(piece, fold=True, unbroken=_FIGURE)[1] <= out.width)
    for number, piece in enumerate(pieces):
        _print_table(f"{table.title}, continued" if number else table.title, piece, unbroken=_FIGURE)


def _interrupted() -> typer.Exit:
    err.print("interrupted; finished seeds are kept, and the same command goes on from there", highlight=False)
    return typer.Exit(130)


def _overrides(settings: Sequence[str], epochs: int | None) -> dict[str, Any]:
    """Return the keys of `--set` and `--epochs`."""
    from .config import parse_settings

    overrides = parse_settings(settings)
    if epochs is not None:
        if "epochs" in overrides:
            raise InputError("--epochs and --set epochs=… say the same thing; give one")
        overrides["epochs"] = epochs
    return overrides


def _seeds(texts: Iterable[str]) -> list[int]:
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


def _show_result(result: Result) -> None:
    from .tables import artifact_tables, result_table

    if result.ok:
        rows = result_table(result)
        if result.std is not None and out.is_terminal and _table(rows, fold=True)[1] > out.width:
            rows = [{key: value for key, value in row.items() if not key.startswith("seed ")} for row in rows]
        _print_table(f"{result.model} on {result.dataset}, test split", rows)
        for name, value in result.protocol.items():
            out.print(f"{name}: {escape(value)}", highlight=False, soft_wrap=True)
        for name, table in artifact_tables(result, SMALL_TABLE).items():
            over = f", mean over {len(result.ok)} seeds" if len(result.ok) > 1 else ""
            # Hooks see the train split, and are left as they were at the best epoch.
            _print_table(f"{name.replace('_', ' ')}, train split at the best epoch{over}", table)
    failed = [str(run.seed) for run in result.runs if run.status == "failed"]
    if failed and result.ok:
        out.print(f"seeds that failed, and do not count above: {', '.join(failed)}", highlight=False, soft_wrap=True)
    for done in result.ok:
        out.print(f"run folder: {escape(str(done.folder))}", highlight=False, soft_wrap=True)


def _print_table(title: str, rows: Sequence[dict[str, str]], unbroken: int = 0) -> None:
    table, width = _table(rows, fold=False, unbroken=unbroken)
    if width > out.width:
        table, width = _table(rows, fold=True, unbroken=unbroken)
    out.print(f"[italic]{escape(title)}[/]", highlight=False, soft_wrap=True)  # a table's own would be cut to its width
    table.width = width if width > out.width else None
    out.print(table, crop=False)


def _table(rows: Sequence[dict[str, str]], *, fold: bool, unbroken: int = 0) -> tuple[Table, int]:
    """Return a table and the width it needs.

    Names, figures and columns of at most `unbroken` characters are never broken; headers are if `fold`.
    """
    table, width = Table(), 1
    for number, column in enumerate(rows[0]):
        cells = [row[column] for row in rows]
        figures = number > 0 and all(cell[:1] in "-0123456789" for cell in cells)
        whole = figures or number == 0 or max(map(cell_len, cells)) <= unbroken
        words = cells if whole else [word for cell in cells for word in cell.split()]
        widest = max(map(cell_len, [*words, *(column.split() if fold else [column])]))
        header = "\n".join(textwrap.wrap(column, widest))
        table.add_column(
            escape(header),
            justify="right" if figures else "left",
            no_wrap=whole,
            min_width=widest,
        )
        width += widest + 3
    for row in rows:
        table.add_row(
            *(f"[bold]{escape(value)}[/]" if hasattr(value, "is_best") else escape(value) for value in row.values())
        )
    return table, width


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="models, datasets, hooks or published (results)")] = "models",
    check: Annotated[bool, typer.Option("--check", help="Import each, and show its summary or its failure.")] = False,
    plugin: Plugin = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what is registered, without importing it."""
    from .plugins import Plugins

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
                _complain(str(found))
    else:
        rows = [_row(entry) for entry in plugins.entries(KINDS[kind])]
    if as_json:
        import json

        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    elif rows:
        _print_table(kind, [{key: str(value) for key, value in row.items()} for row in rows])
    else:
        out.print(f"no {kind} are registered")
    if broken:
        raise typer.Exit(1)


def _row(entry: Entry, **more: str) -> dict[str, str]:
    return {"name": entry.name, "distribution": entry.distribution, "version": entry.version, **more}


@app.command()
def describe(
    model: Annotated[str, typer.Argument(help="A model, or MODEL+HOOK.")],
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Show a model's paper, citation, presets and every config key."""
    from .plugins import Plugins
    from .tables import config_tables

    name, spec, hooks = Plugins(plugin).load_model(model)
    out.print(f"[bold]{escape(name)}[/]: {escape(spec.summary)}", highlight=False)
    for label, value in (("paper", spec.citation), ("at", spec.url), ("hooks", ", ".join(h.name for h in hooks))):
        if value:
            out.print(f"{label}: {escape(value)}", highlight=False)
    presets = [f"{preset} ({', '.join(values)})" for preset, values in spec.presets.items()]
    if presets:
        default = next(iter(spec.presets))
        out.print(f"presets: {escape('; '.join(presets))}; {default} is the default", highlight=False)
    for title, rows in config_tables(spec, hooks).items():
        _print_table(title, rows)


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="A registered model, or the FILE.py of one.")],
    debug: Debug = False,
) -> None:
    """Check a model against the contract, for plugin authors."""
    from .plugins import Plugins
    from .testing import inspect_model

    is_file = target.endswith(".py")
    plugins = Plugins([target] if is_file else [])
    entries = plugins.entries("model")
    names = [entry.name for entry in entries if entry.target == target] if is_file else [target]
    if not names:
        raise InputError(f"{target} holds no model")
    failed = False
    for name in names:
        _, spec, hooks = plugins.load_model(name)
        out.print(f"[bold]{escape(spec.name)}[/]", highlight=False)
        for result in inspect_model(spec, hooks):
            failed |= result.fault is not None
            mark = "[red]fault[/]" if result.fault else "[green]ok[/]   "
            detail = f": {escape(result.fault)}" if result.fault else ""
            out.print(f"  {mark} {escape(result.name)}{detail}", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


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
    from .labels import MEANINGS, find_runs, generated_in_vain, read_labels, to_json, write_files

    found = [read_labels(run) for run in find_runs(folder)]
    files = write_files(found, figure=figure, csv=csv, epoch=epoch)
    if as_json:
        sys.stdout.write(to_json(found, files) + "\n")
        return
    for generated in found:
        _print_table(generated.title, generated.movement_rows())
        if len(generated.shown_epochs) < len(generated.epochs):
            whole = generated.run.folder / "label_movement.csv"
            out.print(f"all {len(generated.epochs)} epochs: {escape(str(whole))}", highlight=False, soft_wrap=True)
        if generated_in_vain(generated.run):
            out.print("no label had moved before the best epoch, whose weights have seen human labels only")
    for column in found[0].movement:
        if column in MEANINGS:
            out.print(f"{column}: {MEANINGS[column]}", highlight=False, soft_wrap=True)
    for written in files:
        out.print(f"figure: {escape(str(written.figure))}", highlight=False, soft_wrap=True)
        out.print(f"labels by clip: {escape(str(written.csv))}", highlight=False, soft_wrap=True)


@app.command("import-checkpoint")
def import_checkpoint(
    model: Annotated[str, typer.Argument(help="The model that the checkpoint is of.")],
    file: Annotated[Path, typer.Argument(help="Upstream's .pth file.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="What it was trained on.")] = "mosi",
    data: Annotated[Path | None, typer.Option(help="Feature file; with it the checkpoint is tested.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Its text encoder: minilm, a hub name or a folder.")] = None,
    label_range: LabelRange = None,
    runs: RunsFolder = Path("runs"),
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Make a run folder of another project's checkpoint."""
    from .checkpoints import import_checkpoint as make_run

    done = make_run(
        model,
        file,
        dataset,
        data=data,
        text_encoder=text_encoder,
        label_range=label_range,
        runs=runs,
        plugins=plugin,
    )
    if done.metrics:
        _print_table(
            f"{model} from {file.name} on {dataset}, test split",
            [{"metric": name, "value": f"{value:.4f}"} for name, value in done.metrics.items()],
        )
    out.print(f"run folder: {escape(str(done.folder))}", highlight=False, soft_wrap=True)
