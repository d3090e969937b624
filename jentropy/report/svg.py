"""Pictures as SVG to stand in an HTML page: text as text, colours by class, so that the page's style decides on them.

A series is told apart by colour (class `c0` ... `c6`, Okabe and Ito's), by dashes and by the shape of its markers. The
pictures have no ids, so that any number of them can stand in one page, and equal arguments give equal text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jentropy.report.html import text

FloatArray = NDArray[np.float64]

NUM_COLOURS = 7
_DASHES = ("", "7 3", "7 3 1.5 3", "2 2", "10 3", "5 2 1.5 2 1.5 2", "1 2.5")
_WIDTH, _HEIGHT = 440.0, 260.0
_RIGHT, _TOP, _BOTTOM = 10.0, 10.0, 40.0
_LETTER = 7.2
"""Width of a digit, on a phone."""
_MARK = 3.4


class Series(NamedTuple):
    """A curve, or points.

    Attributes:
      label: what it is.
      x: `[n]`.
      y: `[n]`; NaN breaks the line.
      style: number of its colour, dashes and marker.
      low: `[n]`, lower end of a band; None for no band.
      high: `[n]`, its upper end.
      line: whether points are joined.
      marks: whether points are marked.
      hollow: whether marks are outlines.
    """

    label: str
    x: FloatArray
    y: FloatArray
    style: int
    low: FloatArray | None = None
    high: FloatArray | None = None
    line: bool = True
    marks: bool = False
    hollow: bool = False


class Bar(NamedTuple):
    """A row of a bar chart: a label, and a value for each quantity, NaN for none."""

    label: str
    values: Sequence[float]


def dashes(style: int) -> str:
    """The dashes of a style: styles of one colour differ in them."""
    return _DASHES[(style + style // NUM_COLOURS) % len(_DASHES)]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers in `[low, high]`, at most some `count` of them.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not span > 0 or not np.isfinite(span):
        return [low]
    power = 10.0 ** np.floor(np.log10(span / count))
    step = power * next(m for m in (1.0, 2.0, 5.0, 10.0) if m * power * count >= span * 0.999)
    first, last = int(np.ceil(low / step - 1e-6)), int(np.floor(high / step + 1e-6))
    return [float(f"{i * step:.10g}") + 0.0 for i in range(first, last + 1)]


def chart(
    series: Sequence[Series], *, title: str, xlabel: str, ylabel: str = "", at_least: tuple[float, float] | None = None,
    verticals: Sequence[float] = (), diagonal: bool = False, integer: bool = False,
) -> str:  # fmt: skip
    """A chart of curves and points.

    Args:
      series: at least one; drawn in this order.
      title: what readers who do not see it are told.
      xlabel: of the horizontal axis.
      ylabel: of the vertical axis.
      at_least: what the vertical axis holds at least.
      verticals: places of dotted lines, such as the beginnings of stages.
      diagonal: whether the line y = x is drawn.
      integer: whether only whole numbers are written at the horizontal axis.

    Returns:
      An `<svg>` element, or an empty string if there is nothing to draw.
    """
    xs, ys = _extent([s.x for s in series]), _extent([v for s in series for v in (s.y, s.low, s.high)])
    if xs is None or ys is None:
        return ""
    if at_least is not None:
        ys = min(ys[0], at_least[0]), max(ys[1], at_least[1])
    axes = _Axes(_padded(*xs, 0.02), _padded(*ys, 0.04), ylabel=ylabel)
    parts = [axes.frame(xlabel, integer)]
    parts += [f'<path class="v" d="M{axes.x(v)} {_TOP:g}V{_HEIGHT - _BOTTOM:g}"/>' for v in verticals]
    if diagonal:
        ends = max(axes.xs[0], axes.ys[0]), min(axes.xs[1], axes.ys[1])
        line = "L".join(f"{axes.x(v)} {axes.y(v)}" for v in ends)
        parts += [f'<path class="v" d="M{line}"/>'] if ends[0] < ends[1] else []
    parts += [axes.band(s) for s in series if s.low is not None]
    parts += [axes.curve(s) for s in series]
    return _svg(_WIDTH, _HEIGHT, title, parts)


def bars(rows: Sequence[Bar], styles: Sequence[int], *, title: str, xlabel: str) -> str:
    """Horizontal bars from zero, one per quantity and row.

    Args:
      rows: from top to bottom.
      styles: number of the colour of each quantity.
      title: what readers who do not see it are told.
      xlabel: of the horizontal axis.

    Returns:
      An `<svg>` element, or an empty string if there is nothing to draw.
    """
    values = _extent([np.array([*row.values, 0.0], np.float64) for row in rows])
    if values is None:
        return ""
    thick = 9.0
    pitch = thick * len(styles) + 9.0
    height = _TOP + pitch * len(rows) + _BOTTOM
    axes = _Axes(_padded(*values, 0.04), (0.0, 1.0), left=112.0, height=height)
    parts = [axes.frame(xlabel, False)]
    for i, row in enumerate(rows):
        top = _TOP + pitch * i + 4.5
        middle = top + thick * len(styles) / 2 + 4
        parts.append(f'<text x="106" y="{middle:.1f}" text-anchor="end">{text(row.label)}</text>')
        for j, (value, style) in enumerate(zip(row.values, styles, strict=True)):
            if np.isfinite(value):
                edge, zero = sorted((axes.pixel_x(value), axes.pixel_x(0.0)))
                parts.append(
                    f'<rect class="r c{style % NUM_COLOURS}" x="{edge:.1f}" y="{top + thick * j:.1f}" '
                    f'width="{max(zero - edge, 0.5):.1f}" height="{thick - 1:g}"><title>{value:.3g}</title></rect>'
                )
    parts.append(f'<path class="a" d="M{axes.x(0.0)} {_TOP:g}V{height - _BOTTOM:.1f}"/>')
    return _svg(_WIDTH, height, title, parts)


def swatch(style: int, *, line: bool = True, marks: bool = True, hollow: bool = False) -> str:
    """A piece of a series for a legend."""
    parts = []
    if line:
        parts.append(f'<path class="l c{style % NUM_COLOURS}"{_dash_attribute(style)} d="M1 6H31"/>')
    if marks:
        kind = "o" if hollow else "m"
        parts.append(f'<path class="{kind} c{style % NUM_COLOURS}" d="{_mark(16.0, 6.0, style)}"/>')
    return f'<svg class="swatch" viewBox="0 0 32 12" width="32" height="12" aria-hidden="true">{"".join(parts)}</svg>'


def block(style: int) -> str:
    """A bar's colour for a legend."""
    return (
        f'<svg class="swatch" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">'
        f'<rect class="r c{style % NUM_COLOURS}" x="1" y="1" width="10" height="10"/></svg>'
    )


class _Axes:
    """Data to pixels, for the ranges `xs` and `ys`; with `left` given, rows stand for ticks at the vertical axis."""

    def __init__(
        self, xs: tuple[float, float], ys: tuple[float, float], *, left: float | None = None, height: float = _HEIGHT,
        ylabel: str = "",
    ) -> None:  # fmt: skip
        self.xs, self.ys, self._height, self._ylabel = xs, ys, height, ylabel
        self._at_y = ticks(*ys) if left is None else []
        longest = max((len(_label(v, self._at_y)) for v in self._at_y), default=0)
        self._left = _LETTER * longest + (24.0 if ylabel else 8.0) if left is None else left

    def pixel_x(self, value: float) -> float:
        return self._left + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (_WIDTH - _RIGHT - self._left)

    def x(self, value: float) -> str:
        return _number(self.pixel_x(value))

    def y(self, value: float) -> str:
        inner = self._height - _BOTTOM - _TOP
        return _number(_TOP + (self.ys[1] - value) / (self.ys[1] - self.ys[0]) * inner)

    def frame(self, xlabel: str, integer: bool) -> str:
        """Grid, ticks and labels."""
        below, right = self._height - _BOTTOM, _WIDTH - _RIGHT
        at_x = [v for v in ticks(*self.xs) if not integer or v == int(v)]
        at_y = self._at_y
        grid = [f"M{self._left:g} {self.y(v)}H{right:g}" for v in at_y]
        grid += [f"M{self.x(v)} {_TOP:g}V{below:g}" for v in at_x] if not at_y else []
        parts = [f'<path class="g" d="{"".join(grid)}"/><path class="a" d="M{self._left:g} {below:g}H{right:g}"/>']
        parts += [
            f'<text x="{self.x(v)}" y="{below + 15:g}" text-anchor="middle">{_label(v, at_x)}</text>' for v in at_x
        ]
        parts += [
            f'<text x="{self._left - 5:g}" y="{float(self.y(v)) + 4:.1f}" text-anchor="end">{_label(v, at_y)}</text>'
            for v in at_y
        ]
        middle = (self._left + right) / 2
        parts.append(
            f'<text x="{middle:g}" y="{self._height - 6:g}" text-anchor="middle" class="n">{text(xlabel)}</text>'
        )
        if self._ylabel:
            centre = (_TOP + below) / 2
            turned = f'transform="rotate(-90 11 {centre:g})"'
            parts.append(
                f'<text x="11" y="{centre:g}" text-anchor="middle" class="n" {turned}>{text(self._ylabel)}</text>'
            )
        return "".join(parts)

    def band(self, series: Series) -> str:
        low, high = series.low, series.high
        assert low is not None and high is not None
        path = []
        for part in _pieces(np.isfinite(series.x) & np.isfinite(low) & np.isfinite(high)):
            up = [f"{self.x(a)} {self.y(b)}" for a, b in zip(series.x[part], high[part])]
            down = [f"{self.x(a)} {self.y(b)}" for a, b in zip(series.x[part][::-1], low[part][::-1])]
            path.append(f"M{'L'.join(up + down)}Z")
        return f'<path class="b c{series.style % NUM_COLOURS}" d="{"".join(path)}"/>' if path else ""

    def curve(self, series: Series) -> str:
        colour, parts = f"c{series.style % NUM_COLOURS}", []
        good = np.isfinite(series.x) & np.isfinite(series.y)
        points = [(self.x(a), self.y(b)) for a, b in zip(series.x[good], series.y[good])]
        title = f"<title>{text(series.label)}</title>"
        if series.line:
            path = []
            for part in _pieces(good):
                at = [f"{self.x(a)} {self.y(b)}" for a, b in zip(series.x[part], series.y[part])]
                path.append(f"M{'L'.join(at)}" if len(at) > 1 else f"M{at[0]}h.1")
            parts.append(f'<path class="l {colour}"{_dash_attribute(series.style)} d="{"".join(path)}">{title}</path>')
        if series.marks:
            kind = "o" if series.hollow else "m"
            path = "".join(_mark(float(a), float(b), series.style) for a, b in points)
            parts.append(f'<path class="{kind} {colour}" d="{path}">{title}</path>')
        return "".join(parts)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _dash_attribute(style: int) -> str:
    return f' stroke-dasharray="{dashes(style)}"' if dashes(style) else ""


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _label(value: float, among: Sequence[float]) -> str:
    """A tick's number, with as many decimals as its neighbours need."""
    largest = max(abs(v) for v in among)
    if largest and not 1e-3 <= largest < 1e6:
        return f"{value:.3g}"
    decimals = max(len(f"{v:.6f}".rstrip("0").partition(".")[2]) for v in among)
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def _extent(arrays: Sequence[FloatArray | None]) -> tuple[float, float] | None:
    """Smallest and largest finite number; None if there is none."""
    found = [array[np.isfinite(array)] for array in arrays if array is not None]
    found = [array for array in found if array.size]
    return (float(min(a.min() for a in found)), float(max(a.max() for a in found))) if found else None


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """The range, a little wider; around a single value wide enough to hold it."""
    around = share * (high - low) or 0.05 * abs(low) or 0.5
    return (low - around if low else low - around / 2), high + around


def _pieces(good: NDArray[np.bool_]) -> list[slice]:
    """The runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def _mark(x: float, y: float, style: int) -> str:
    """Circle, square, triangle, diamond, triangle upside down, cross, plus."""
    r = _MARK
    p, q = f"{x:.1f}", f"{y:.1f}"
    return (
        f"M{x - r:.1f} {q}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0Z",
        f"M{x - r + 0.4:.1f} {y - r + 0.4:.1f}h6v6h-6Z",
        f"M{p} {y - r - 0.6:.1f}l4 7h-8Z",
        f"M{p} {y - r - 1:.1f}l4.4 4.4l-4.4 4.4l-4.4 -4.4Z",
        f"M{p} {y + r + 0.6:.1f}l4 -7h-8Z",
        f"M{x - 3:.1f} {y - 4:.1f}l3 3l3 -3l1 1l-3 3l3 3l-1 1l-3 -3l-3 3l-1 -1l3 -3l-3 -3Z",
        f"M{x - 1:.1f} {y - 4:.1f}h2v3h3v2h-3v3h-2v-3h-3v-2h3Z",
    )[style % NUM_COLOURS]
