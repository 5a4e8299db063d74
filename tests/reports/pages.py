"""Read a report as a browser would: tags, text, pictures, and what it would fetch."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

EMPTY = {"meta", "link", "br", "hr", "img"}


@dataclass
class Parsed:
    text: str = ""
    pictures: int = 0
    rows: int = 0
    alts: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    external: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page, self.open = Parsed(), []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.page.tags.add(tag)
        self.page.rows += tag == "tr"
        for name in ("src", "href", "srcset", "data", "action"):
            where = values.get(name)
            if where and not where.startswith(("data:", "#")):
                self.page.external.append(where)
        if tag == "img":
            self.page.pictures += values["src"].startswith("data:image/png;base64,")
            self.page.alts.append(values["alt"])
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if "style" not in self.open:
            self.page.text += data
        if self.open and self.open[-1] in {"h1", "h2", "h3"}:
            self.page.headings.append(data)


def parse(html: str) -> Parsed:
    """Fails on tags that are not closed."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [], f"never closed: {reader.open}"
    assert "url(" not in html
    assert "@import" not in html
    return reader.page
