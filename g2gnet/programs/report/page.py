"""The report as one self-contained HTML page: text is escaped, pictures are embedded."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

#: pixels per inch of the pictures: twice the page's resolution
DPI = 150
#: width of a picture, in inches, below which a telephone shows all of it
NARROW = 5
#: only content of the page may be shown
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
p, h2, li { overflow-wrap: anywhere; } p, li { max-width: 58rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 3rem; border-bottom: 2px solid #0072b2; } h3 { margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.45rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td:first-child { min-width: 9rem; } td + td { white-space: nowrap; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
div.wide { overflow-x: auto; margin: 1rem 0; }
/* a shadow at an edge shows that there is more beyond it; the scroll bar stays */
div.wide { background: linear-gradient(90deg, #fff 40%, #fff0) left, linear-gradient(270deg, #fff 40%, #fff0) right,
  linear-gradient(90deg, #0006, #0000) left, linear-gradient(270deg, #0006, #0000) right; background-repeat: no-repeat;
  background-size: 3rem 100%, 3rem 100%, 0.8rem 100%, 0.8rem 100%;
  background-attachment: local, local, scroll, scroll; }
div.wide::-webkit-scrollbar { height: 0.5rem; } div.wide::-webkit-scrollbar-thumb { background: #888; }
figure { margin: 1.5rem 0; } img { display: block; width: 100%; min-width: 40rem; }
figcaption { font-size: 0.875rem; color: #444; max-width: 50rem; }
nav ul { padding-left: 1.2rem; } a { color: #0072b2; }
details { margin: 1rem 0; } summary { cursor: pointer; color: #0072b2; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A page of parts that the functions below make."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            heading(1, title),
            *body,
            "</body>\n</html>\n",
        ]
    )


def heading(level: int, text: str, anchor: str | None = None) -> str:
    """A heading; :func:`contents` links to its ``anchor``."""
    place = "" if anchor is None else f' id="{html.escape(anchor)}"'
    return f"<h{level}{place}>{html.escape(text)}</h{level}>"


def contents(anchors: Mapping[str, str]) -> str:
    """Links to headings of the page: their texts by their anchors."""
    links = [f'<li><a href="#{html.escape(anchor)}">{html.escape(text)}</a></li>' for anchor, text in anchors.items()]
    return "\n".join(["<nav><ul>", *links, "</ul></nav>"])


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a row of headings; the first column names the rows."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def details(summary: str, parts: Iterable[str]) -> str:
    """Parts shown on click."""
    return "\n".join([f"<details>\n<summary>{html.escape(summary)}</summary>", *parts, "</details>"])


def picture(figure: Figure, caption: str) -> str:
    """A figure with its caption, which says how to read it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, transparent=True)  # the shadow at an edge is behind it
    data, text = base64.b64encode(content.getvalue()).decode(), html.escape(caption)
    width = float(figure.get_figwidth())
    # letters have one size on all pictures
    style = f"max-width: {6.5 * width:g}rem" + "; min-width: 0" * (width < NARROW)
    return (
        f'<figure>\n<div class="wide"><img alt="{text}" style="{style}" src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{text}</figcaption>\n</figure>"
    )
