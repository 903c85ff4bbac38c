"""What the tests of the report share: a page read as a browser would read it, and evaluations with other figures."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from patchrank import assets
from patchrank.pruning.methods import METHODS, UNPRUNED

LABELS = {UNPRUNED: "Unpruned"} | {name: entry.label for name, entry in METHODS.items()}
CLASSES = ["<b>&\"'", *json.loads(Path(assets.CLASSNAMES).read_text())[1:]]
VOID = {"meta", "link", "img", "br", "source"}


class Page(HTMLParser):
    """Elements, tables and text of a page; fails on tags that do not nest.

    Attributes:
        elements: tag and attributes, in order.
        tables: by what a screen reader calls them, rows of cells.
        text: all text but that of the style sheet.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = self.style = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute comes twice in {tag}"
        self.elements.append((tag, found))
        if tag not in VOID:
            self._open.append(tag)
        if found.get("role") == "region":
            self._rows = self.tables[found["aria-label"]] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] == ["style"]:
            self.style += data
            return
        self.text += data
        if self._open[-1:] in (["td"], ["th"]):
            self._rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def alts(self, start: str) -> list[str]:
        return [image["alt"] for image in self.all("img") if image["alt"].startswith(start)]

    def table(self, start: str) -> list[list[str]]:
        """The rows of the table whose name starts so, without its head."""
        (name,) = [name for name in self.tables if name.startswith(start)]
        head, *rows = self.tables[name]
        assert all(len(row) == len(head) for row in rows)
        return rows


def addresses(page: Page) -> Iterator[str]:
    """Whatever a browser would load or go to."""
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href", "ping"):
                yield value
    yield from re.findall(r"url\(\s*['\"]?([^)]*)", page.style)


def changed(folder: Path, tmp_path: Path, **changes) -> str:
    """A copy of an evaluation with other figures."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    content = json.loads((folder / "figures.json").read_text())
    (copy / "figures.json").write_text(json.dumps(content | changes))
    return str(copy)


def svg(uri: str) -> str:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()
