"""Markdown as one HTML page that holds everything it shows: it can be mailed, and opened without a network."""

from __future__ import annotations

import base64
import html
import itertools
from pathlib import Path

from markdown_it import MarkdownIt

LOOKS = """
:root { color-scheme: light dark; --ink: #1f2933; --paper: #ffffff; --line: #d9dee3; --soft: #f4f6f8; --link: #1f6fb4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14181c; --line: #39424b; --soft: #1e242a; --link: #7db8e8 }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin-top: 1.6rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--soft) } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 4px }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; border-radius: 4px } code { font-size: .88em }
a { color: var(--link) }
"""


def html_page(title: str, markdown: str, folder: Path) -> str:
    """The page. markdown: CommonMark with tables, its own HTML shown as text; folder: where its pictures lie.

    Pictures become part of the page, and the page forbids itself to load anything: a name in a model's or corpus'
    files cannot make a reader's browser fetch or run what it likes.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(markdown)
    for part in itertools.chain.from_iterable(token.children or () for token in tokens):
        if part.type != "image":
            continue
        picture = folder / str(part.attrs["src"])
        if picture.suffix == ".png" and picture.parent == folder and picture.is_file():
            part.attrs["src"] = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        else:  # the words of a file, not a picture of ours
            part.type, part.tag, part.children = "text", "", None
    body = reader.renderer.render(tokens, reader.options, {})
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{LOOKS}</style>
</head>
<body><main>
{body}</main></body>
</html>
"""
