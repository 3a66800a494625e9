"""A check of pages: that a browser shows them without any other file, host or script."""

from __future__ import annotations

from html.parser import HTMLParser

EMPTY = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page; fails at a tag that closes another than the one last opened, and at what is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                assert value and value.startswith(("data:image/", "#")), (tag, value)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def needs_nothing_else(page: str) -> None:
    """Fail unless the page is well formed and whole by itself."""
    assert page.startswith("<!doctype html>")
    Page(page)
    assert "url(http" not in page and "@import" not in page
