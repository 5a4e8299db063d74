"""One self-contained HTML page: style, figures and tables inside; opens offline, prints well, fits a phone."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup, escape

from brainfm_cli.provenance import brainfm_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.figure import Figure

_WIDE_INCHES = 7.5


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page."""

    title: str
    """Heading; also the anchor of the table of contents."""
    blocks: tuple[Markup, ...] = ()
    """Paragraphs, figures, tables, made by the functions of this module."""
    lead: str = ""
    """One plain sentence on what the reader is looking at."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report."""

    title: str
    """Shown as heading and window title."""
    subtitle: str = ""
    """What data, which command."""
    facts: dict[str, str] = field(default_factory=dict)
    """Key figures shown at the top."""
    notes: tuple[str, ...] = ()
    """Warnings shown above everything else."""
    sections: tuple[Section, ...] = ()
    """In order."""
    methods: str = ""
    """Methods paragraph for a paper."""
    citations: tuple[str, ...] = ()
    """What to cite."""

    def render(self) -> str:
        """The page as HTML text. Every string from a dataset is escaped."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
        return template.render(page=self, version=brainfm_version())


def paragraph(text: str) -> Markup:
    """A paragraph of plain text."""
    return Markup("<p>{}</p>").format(text)


def heading(text: str) -> Markup:
    """A heading within a section."""
    return Markup("<h3>{}</h3>").format(text)


def side_by_side(*columns: Sequence[Markup]) -> Markup:
    """Columns of figures beside one another where the screen is wide enough, otherwise below one another."""
    parts = Markup("").join(Markup("<div>{}</div>").format(Markup("").join(column)) for column in columns)
    return Markup('<div class="beside">{}</div>').format(parts)


def figure(drawing: Figure, *, caption: str, alt: str, dpi: int = 110, colours: int | None = None, trim: bool = True) -> Markup:
    """A matplotlib figure as an embedded picture.

    ``colours`` (at most 256) stores a palette instead of every pixel's colour: a third of the bytes for matrices and carpets.
    ``trim`` cuts the margins to what is drawn, which takes drawing it twice.
    """
    buffer = io.BytesIO()
    # No date or version inside the file: the same figure gives the same bytes.
    drawing.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight" if trim else None, metadata={"Software": None})
    png = buffer.getvalue() if colours is None else _with_palette(buffer, colours)
    return picture(png, caption=caption, alt=alt, wide=bool(drawing.get_figwidth() > _WIDE_INCHES))


def picture(png: bytes, *, caption: str, alt: str, wide: bool = False) -> Markup:
    """A PNG image as an embedded picture; a wide one scrolls on a narrow screen, where shrinking would make its text unreadable."""
    shown = Markup('<figure><div{}><img src="data:image/png;base64,{}" alt="{}"></div><figcaption>{}</figcaption></figure>')
    return shown.format(Markup(' class="wide"') if wide else "", base64.b64encode(png).decode(), alt, caption)


def table(frame: pd.DataFrame, *, caption: str = "", highlight: Sequence[int] = ()) -> Markup:
    """A table of plain values, cells escaped; rows whose position is in ``highlight`` are marked."""
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in frame.columns)
    rows = Markup("").join(
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="marked"') if position in highlight else "",
            Markup("").join(Markup("<td>{}</td>").format(_cell(value)) for value in row),
        )
        for position, row in enumerate(frame.itertuples(index=False, name=None))
    )
    return Markup('<div class="scroll"><table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        caption, head, rows
    )


def code(text: str) -> Markup:
    """Preformatted text, e.g. a command line."""
    return Markup("<pre>{}</pre>").format(escape(text))


def _with_palette(png: io.BytesIO, colours: int) -> bytes:
    from PIL import Image  # matplotlib writes its PNG with it

    reduced = io.BytesIO()
    Image.open(png).convert("RGB").quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        reduced, format="png", optimize=True
    )
    return reduced.getvalue()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "n/a" if value != value else f"{value:.4g}"  # noqa: PLR0124  (NaN is the only value unequal to itself)
    return "" if value is None else str(value)
