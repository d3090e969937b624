"""Tables in Markdown, aligned so that they read as plain text too."""

from collections.abc import Mapping, Sequence

MISSING = "–"


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Formats rows as an aligned Markdown table.

    Floats get three decimals, numbers are aligned to the right, and a missing or `None` value is a dash.

    Args:
      rows: one mapping per row; keys that are not columns are left out.
      columns: keys in order, or key -> heading.

    Returns:
      The table, one line per row after two of heading, without a final newline.

    >>> print(table([{"method": "GRPO", "reward": 0.98765}, {"method": "Clip-Cov"}], ["method", "reward"]))
    | method   | reward |
    | :------- | -----: |
    | GRPO     |  0.988 |
    | Clip-Cov |      – |
    """
    if not columns:
        raise ValueError("columns must name at least one column, got none")
    headings = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    cells = [[_text(row.get(key)) for key in headings] for row in rows]
    numeric = [all(_is_number(row.get(key)) for row in rows) and bool(rows) for key in headings]
    lines = [[_escape(heading) for heading in headings.values()], *cells]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(headings))]
    rule = ["-" * (w - 1) + ":" if right else ":" + "-" * (w - 1) for w, right in zip(widths, numeric)]
    lines.insert(1, rule)
    return "\n".join(
        "| " + " | ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric)) + " |"
        for line in lines
    )


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _text(value: object) -> str:
    if value is None:
        return MISSING
    return f"{value:.3f}" if isinstance(value, float) else _escape(str(value))


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
