"""Pieces of one HTML page that needs nothing from outside and runs nothing.

Whatever a model, a config or a folder's name says is text: `text` escapes it and shows what one could not see, such as
control characters, marks that turn the direction of writing, and characters without width. The page carries a policy
(Content-Security-Policy) that forbids scripts, requests, frames and every style but its own.
"""

import base64
import hashlib
import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from jentropy.report.style import STYLE

MISSING = "–"
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {chr(c) for c in range(0xFE00, 0xFE10)}
_MAX_MARKS = 2
"""Combining marks on one character; further ones are shown by their numbers."""
_CONTROLS = (
    "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
).split()


def visible(string: str) -> str:
    """The string with everything unseen made visible: newlines as ↵, tabs as ⇥, controls by name, the rest as U+.

    A combining mark at the beginning, or one too many on a character, is shown by its number as well.

    >>> visible("a\\tb\\u202ec\\x00")
    'a⇥b‹U+202E›c‹NUL›'
    """
    found, marks = [], _MAX_MARKS
    for character in string:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        found.append(_number(character) if marks > _MAX_MARKS else _visible(character, category))
    return "".join(found)


def _visible(character: str, category: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return "↵" if character == "\n" else "⇥"
    if code < 0x20:
        return f"‹{_CONTROLS[code]}›"
    if category in _HIDDEN_CATEGORIES or character in _BLANK or (category == "Zs" and character != " "):
        return _number(character)
    return character


def _number(character: str) -> str:
    return f"‹U+{ord(character):04X}›"


def text(value: object) -> str:
    """A value as text of the page or of an attribute between quotes."""
    return html.escape(visible(str(value)), quote=True)


def table(rows: Iterable[Mapping[str, object]], columns: Mapping[str, str], *, wide: bool = False) -> str:
    """A table in a box of its own, in which it scrolls sideways where it is too wide.

    Args:
      rows: values by key. Floats get three decimals, None is a dash, and everything is text, escaped here; an `Html`
        stands as it is.
      columns: key -> heading.
      wide: whether cells may break lines.
    """
    rows = list(rows)
    numeric = {key: all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key in columns}
    head = "".join(f'<th scope="col"{_number_class(numeric[key])}>{text(name)}</th>' for key, name in columns.items())
    body = "".join(
        f"<tr>{''.join(f'<td{_number_class(numeric[key])}>{cell(row.get(key))}</td>' for key in columns)}</tr>"
        for row in rows
    )
    kind = ' class="wide"' if wide else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


class Html(str):
    """Text that is HTML already."""


def cell(value: object) -> str:
    """A value as the content of a table's cell."""
    if value is None:
        return MISSING
    if isinstance(value, Html):
        return value
    return number(value) if isinstance(value, float) else text(value)


def number(value: float) -> str:
    """Three decimals, with a minus sign that is as wide as a digit."""
    return f"{value:.3f}".replace("-", "\u2212")


def _number_class(numeric: bool) -> str:
    return ' class="num"' if numeric else ""


def paragraph(sentence: str, kind: str = "") -> str:
    """A paragraph of text; `kind` is its class."""
    return f'<p class="{kind}">{text(sentence)}</p>' if kind else f"<p>{text(sentence)}</p>"


def notes(sentences: Sequence[str]) -> str:
    """A list of remarks; nothing without any."""
    return f'<ul class="notes">{"".join(f"<li>{text(s)}</li>" for s in sentences)}</ul>' if sentences else ""


def figure(svg: str, caption: str, legend: str = "") -> str:
    """A picture with its caption above and a legend below; without a picture, that there is nothing to draw."""
    inner = svg or '<p class="empty">nothing recorded</p>'
    return f"<figure><figcaption>{text(caption)}</figcaption>{inner}{legend}</figure>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Entries (swatch, label); swatches are HTML, labels are text."""
    return f'<ul class="legend">{"".join(f"<li>{swatch}{text(label)}</li>" for swatch, label in entries)}</ul>'


def section(name: str, heading: str, body: str) -> str:
    """A section with its heading; `name` is its anchor."""
    return f'<section id="{name}"><h2>{text(heading)}</h2>{body}</section>'


def details(summary: str, body: str) -> str:
    """What is shown on demand; `body` is HTML."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def page(title: str, body: str) -> str:
    """The whole page; `body` is HTML without scripts and without `style` attributes."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )
