"""`report`: a self-contained page of finished runs, and its figures as files for a paper.

registry.report(["runs/"], "report.html", dataset="mosi", data="unaligned_50.pkl", figures="figures/")
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..comparison import Comparison, collect
from ..errors import InputError, unknown
from ..forms import TABLE_STYLE, html_table
from ..runs import finished, require_file, write_file
from ..side_by_side import of_interest, published_results
from .clips import read_clips
from .pictures import FORMATS, svg, write_pictures
from .sections import Section, facts_of, sections_of

Tell = Callable[[str], Any]
"""is told what is being made"""


def report(
    folders: Sequence[str | Path],
    target: str | Path = "report.html",
    *,
    reference: str | None = None,
    dataset: str | None = None,
    metrics: Sequence[str] = (),
    published: bool = False,
    data: str | Path | None = None,
    data_root: str | Path | None = None,
    figures: str | Path | None = None,
    figure_format: str = "pdf",
    plugins: Sequence[str] = (),
    tell: Tell = lambda what: None,
) -> Comparison:
    """Write a page of the runs in folders, with everything in it; what was there is replaced.

    Args:
        folders: of seeds, of configurations, or any above them.
        target: the page.
        reference: the row that the others are compared with; the first one by default.
        dataset: the one whose runs are meant, where there are several.
        metrics: those to show besides MAE; all in tables and MAE alone in the figure by default.
        published: whether results of others stand beside.
        data: the feature file of the runs, for the clips' texts, or the name of a registered one; by default what the
            dataset makes, or the registered file that the runs were trained on.
        data_root: the folder of registered files.
        figures: a folder that gets each figure as a file.
        figure_format: `pdf`, `png` or `svg`.
        plugins: files or modules of hooks and datasets that are not packaged.
        tell: is called with a line for each part that is made.

    Returns:
        What is on the page; a row's `note` says what failed.

    Raises:
        InputError: as for `registry.comparison.collect`, or the data or a name of a file is wrong.
    """
    page = Path(os.path.expanduser(target))
    folder = None if figures is None else Path(os.path.expanduser(figures))
    _check_places(page, folder, figure_format)
    tell("reading runs")
    comparison = collect(folders, reference, dataset=dataset, metrics=metrics, plugins=plugins)
    results = of_interest(comparison, published_results(plugins)) if published else []
    if published and not results:
        warnings.warn(f"nothing is published of these models on {comparison.dataset}", stacklevel=2)
    tell("reading clips")
    clips = read_clips(comparison, data, plugins, data_root)
    tell("comparing models")
    sections = sections_of(comparison, results, clips)
    text = render(comparison, sections, tell)
    write_file(page, lambda path: path.write_text(text, "utf-8", errors="replace"))
    if folder is not None:
        for section in sections:
            if section.pictures:
                tell(f"{section.heading}, as {figure_format}")
                write_pictures(folder, section.key, section.pictures, figure_format)
    return comparison


def _check_places(page: Path, folder: Path | None, form: str) -> None:
    require_file(page, "--out")
    if form not in FORMATS:
        raise InputError(unknown("figure format", form, FORMATS))
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"--figures {folder} is not a folder")
    for option, place in (("--out", page.parent), ("--figures", folder)):
        if place is not None and finished(place):
            raise InputError(f"{option} would write into {place}, the folder of a run, which stays as it is")


def render(comparison: Comparison, sections: Sequence[Section], tell: Tell) -> str:
    """Return the page as HTML; all text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {}
    for section in sections:
        if section.pictures:
            tell(section.heading)
        drawn[section.key] = [
            Markup(svg(picture, f"{section.key}-{number}")) for number, picture in enumerate(section.pictures)
        ]
    return environment.get_template("page.html.j2").render(
        title=f"Models on {comparison.dataset}",
        facts=facts_of(comparison),
        failed=[(row.name, row.note) for row in comparison.rows if row.note],
        sections=sections,
        drawn=drawn,
        table=lambda made: Markup(html_table(made)),
        table_style=Markup(TABLE_STYLE),
    )
