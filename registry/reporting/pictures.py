"""What a picture of a report is, and how it becomes SVG within a page or a file of a paper."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..runs import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

AnyFigure: TypeAlias = "Figure | SubFigure"
FORMATS = ("pdf", "png", "svg")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind people tell apart; without their yellow, which is faint on white"""
INK, GREY = "#1a1a1a", "#767676"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a model's name may have dollars in it
    "pdf.fonttype": 42,  # publishers refuse Type 3
    "svg.hashsalt": "report",  # the same runs give the same file
}
_ACROSS, _DOWN = 3, 4
"""panels of a file"""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_TITLE = 0.24
"""inches of a panel's title in a file"""


@dataclass(frozen=True)
class Picture:
    """One picture of a page."""

    title: str
    alt: str
    """what is to be seen, for those who cannot"""
    make: Callable[[], Figure]
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """A picture that stands beside others of its kind, with the same axes in the same place."""

    title: str
    alt: str
    size: tuple[float, float]
    """width and height in inches"""
    draw: Callable[[AnyFigure], None]
    caption: str = ""

    def make(self) -> Figure:
        """Return it as a figure of its own."""
        from matplotlib.figure import Figure

        made = Figure(figsize=self.size)
        self.draw(made)
        return made


def sheets(panels: Sequence[Panel]) -> list[Figure]:
    """Return panels beside one another, at most twelve in a figure."""
    from matplotlib.figure import Figure

    found = []
    most = _ACROSS * _DOWN
    for part in (panels[start : start + most] for start in range(0, len(panels), most)):
        across = min(_ACROSS, len(part))
        down = -(-len(part) // across)
        width, height = part[0].size[0], max(panel.size[1] for panel in part)
        made = Figure(figsize=(width * across, (height + _TITLE) * down))
        ratios = [_TITLE, height] * down
        grid = made.subfigures(2 * down, across, wspace=0, hspace=0, height_ratios=ratios, squeeze=False)
        for number, panel in enumerate(part):
            row, column = divmod(number, across)
            grid[2 * row, column].text(0.5, 0.2, shortened(panel.title, 42), ha="center", va="bottom", weight="bold")
            panel.draw(grid[2 * row + 1, column])
        found.append(made)
    return found


def write_pictures(folder: Path, name: str, pictures: Sequence[Panel | Picture], form: str) -> list[Path]:
    """Write pictures as files for a paper: panels side by side, others one by one; what is there is replaced.

    Raises:
        InputError: a file cannot be written.
    """
    from matplotlib import rc_context

    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(form)
    with rc_context(STYLE):
        panels = [picture for picture in pictures if isinstance(picture, Panel)]
        made = sheets(panels) + [picture.make() for picture in pictures if isinstance(picture, Picture)]
        names = [name if len(made) == 1 else f"{name}-{number}" for number in range(1, len(made) + 1)]
        paths = [folder / f"{name}.{form}" for name in names]
        for figure, path in zip(made, paths, strict=True):
            write_file(path, partial(figure.savefig, format=form, dpi=300, metadata=dates))
    return paths


def svg(picture: Panel | Picture, key: str) -> str:
    """Return a picture as SVG to stand in a page: it has a text for those who do not see it, and no style of its own.

    Args:
        picture: is drawn.
        key: begins every id, so that no two pictures of a page share one.
    """
    from matplotlib import rc_context

    file = BytesIO()
    looks = {**STYLE, "svg.fonttype": "none"}  # text stays text: it can be searched
    with rc_context(looks), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts will have it
        picture.make().savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    view = root.attrib["viewBox"]
    ids: dict[str, str] = {}
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        for child in [child for child in element if _local(child.tag) in ("metadata", "style")]:
            element.remove(child)  # a style would be the whole page's
        for name in ("href", "clip-path"):
            reference = element.attrib.pop(next((n for n in element.attrib if _local(n) == name), ""), "")
            if reference:
                old = reference.removeprefix("url(").removesuffix(")").removeprefix("#")
                new = ids.setdefault(old, f"{key}-{len(ids)}")
                element.set(name, reference.replace(old, new))
    for element in root.iter():
        if "id" in element.attrib:
            name = element.attrib.pop("id")
            element.attrib |= {"id": ids[name]} if name in ids else {}
    natural = float(view.split()[2]) * 1.45  # CSS has 4/3 pixels a point; letters of 8 points are small on a screen
    root.attrib.clear()
    root.attrib |= {"viewBox": view, "role": "img", "aria-label": picture.alt, "style": f"--natural: {natural:.0f}px"}
    return ET.tostring(root, "unicode", short_empty_elements=False)


def _local(name: str) -> str:
    """Return a name of XML without its namespace."""
    return name.rpartition("}")[2]


def printable(text: str) -> str:
    """Return text in one line, without the characters that XML does not have."""
    return " ".join(_UNPRINTABLE.sub(" ", text).split())


def shortened(text: str, most: int) -> str:
    """Return text in one line of at most `most` characters, its middle left out where it is longer."""
    text = printable(text)
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
