"""Reads a page as a browser would, and refuses one that is not well formed or asks for anything from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "br", "input", "circle", "rect", "line", "path", "image"}


class PageReader(HTMLParser):
    """What a page says, links to and loads."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.said: list[str] = []
        self._open: list[str] = []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open, f"not closed: {self._open}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.handlers += [name for name in values if name.startswith("on")]
        link = values.get("href")
        if link and tag == "a":
            self.links.append(link)
        elif link:
            self.loads.append(link)
        self.loads += [values["src"] or ""] if "src" in values else []
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.said.append(data)
        elif self._open:
            assert "http" not in data and "url(" not in data and "@import" not in data


def check_self_contained(page: PageReader) -> None:
    """No script, no handler, nothing loaded that is not in the page itself."""
    assert "script" not in page.tags and "iframe" not in page.tags and not page.handlers
    assert all(load.startswith("data:") for load in page.loads), page.loads
    assert all(link.startswith(("#", "http://", "https://")) for link in page.links), page.links
    assert "default-src 'none'" in page.source
