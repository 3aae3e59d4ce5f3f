"""Pieces of the page: tables and figures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of words; `kind` is its classes: "sortable", "numbers" (to the right but the first column), "facts"."""

    def cell(head: str) -> str:
        return f"<th><button>{html.escape(head)}</button></th>" if "sortable" in kind else f"<th>{html.escape(head)}</th>"

    head = "".join(map(cell, heads))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(caption: str, svg: str, of: str = "by step") -> str:
    """A picture under its caption; `of` ends the words that a screen reader says."""
    spoken = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)} {of}" ', 1)
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{spoken}</figure>"


def figures(found: Iterable[str]) -> str:
    """Figures beside one another where there is room."""
    return f'<div class="plots">{"".join(found)}</div>'
