"""An HTML page as a browser would take it."""

import re
from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img"}
APART = {
    "p",
    "h1",
    "h2",
    "h3",
    "th",
    "td",
    "dt",
    "dd",
    "li",
    "small",
    "text",
    "title",
    "desc",
    "summary",
    "pre",
    "a",
}


class Page(HTMLParser):
    """What a browser would find: text, tags, ids, references; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(self.text.split())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.text += " " if tag in APART else ""
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            elif name == "aria-label":
                self.labels.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.references += re.findall(r"(?:@import|url\()[^;]*", data)
        else:
            self.text += data
