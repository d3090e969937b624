"""The style of a report: one column, the system's fonts, light, dark and on paper.

Scales have one hue and steps of equal lightness in Oklab, so that more is darker (brighter on a dark page) for every
reader; scales of signed numbers have a hue for each sign, blue and orange.
"""

import math

NUM_LEVELS = 8
"""Levels of a scale from 0 up; one of signed numbers has the middle and as many on each side as `NUM_SIGNED`."""
NUM_SIGNED = 4
MAX_MARKED = 8
"""Mechanisms whose tokens can be marked."""

_DARK_INK = 0.565
"""The lightness at which black and white text have equal contrast."""
_PURPLE, _BLUE, _ORANGE = 310.0, 250.0, 55.0


def _hex(lightness: float, chroma: float, hue: float) -> str:
    """Oklch to sRGB, with as much of the chroma as sRGB can show."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    l, m, s = (
        (lightness + p * a + q * b) ** 3
        for p, q in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    )
    linear = (
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )
    if chroma > 0.002 and not all(-1e-4 <= x <= 1.0001 for x in linear):
        return _hex(lightness, chroma - 0.002, hue)
    gamma = [12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in (max(x, 0.0) for x in linear)]
    return "#" + "".join(f"{round(255 * min(max(x, 0.0), 1.0)):02x}" for x in gamma)


def _level(share: float, hue: float, dark: bool) -> str:
    """Background and text of a token whose value is `share` of the scale."""
    lightness = 0.26 + 0.56 * share if dark else 0.985 - 0.56 * share
    ink = "#000" if lightness > _DARK_INK else "#fff"
    return f"background:{_hex(lightness, 0.02 + 0.14 * share, hue)};color:{ink}"


def _scales(dark: bool) -> str:
    """Rules for the levels of entropy (`e0` ...) and of signed covariance (`v0` ...) and advantage (`a0` ...)."""
    top, rules = NUM_LEVELS - 1, []
    for i in range(NUM_LEVELS):
        rules.append(f"#by-entropy:checked~.atlas .e{i},.key .e{i}{{{_level(i / top, _PURPLE, dark)}}}")
    for i in range(2 * NUM_SIGNED + 1):
        share, hue = abs(i - NUM_SIGNED) / NUM_SIGNED, _BLUE if i < NUM_SIGNED else _ORANGE
        chosen = f"#by-covariance:checked~.atlas .v{i},#by-advantage:checked~.atlas .a{i},.key .v{i}"
        rules.append(f"{chosen}{{{_level(share, hue, dark)}}}")
    return "\n".join(rules)


def _marks() -> str:
    rules = [f"#mark-{i}:checked~.atlas .k{i}" for i in range(MAX_MARKED)]
    return f"{','.join(rules)}{{outline:2px solid var(--ink);outline-offset:-1px;border-radius:0}}"


_LIGHT = """--page:#fff;--ink:#1a1a1a;--soft:#5a5a5a;--rule:#d8d8d8;--box:#f6f6f6;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#000"""
_DARK = """--page:#16181b;--ink:#e8e8e8;--soft:#a8a8a8;--rule:#3a3d42;--box:#202327;
--c0:#3f9fdc;--c1:#ee7d2b;--c2:#1fc295;--c3:#dd94bb;--c4:#efb52e;--c5:#8ccdf4;--c6:#f2f2f2"""

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .4em}
h2{font-size:1.3rem;margin:2.4em 0 .6em;padding-top:.5em;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.8em 0 .5em}
h1,h2,h3,figcaption,li,p,summary,.wide td{overflow-wrap:anywhere}
p{margin:.5em 0;max-width:75ch}
.soft,.notes,.empty{color:var(--soft)}
.notes{padding-left:1.2em;font-size:.9rem;max-width:85ch}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2em 1.2em;padding:0;margin:1em 0}
a{color:var(--c0)}
.scroll{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3em .9em .3em 0;text-align:left;vertical-align:top;white-space:nowrap}
tr{border-bottom:1px solid var(--rule)}
th{font-weight:600;white-space:normal;vertical-align:bottom}
.wide td{white-space:normal;min-width:8em;max-width:22em}
td.num,th.num{text-align:right}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:.3em}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.8em 2em;margin:1.2em 0}
.chart{display:block;width:100%;max-width:560px;height:auto}
.chart text{font-size:12px;fill:var(--soft)}
.chart .n{fill:var(--ink)}
.l{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.m{fill:var(--c)}.o{fill:none;stroke:var(--c);stroke-width:1.2;opacity:.75}.b{fill:var(--c);opacity:.16}.r{fill:var(--c)}
.g{stroke:var(--rule);stroke-width:.7;fill:none}.a{stroke:var(--soft);fill:none}
.v{stroke:var(--soft);stroke-dasharray:2 3;fill:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1em 1.1em;padding:0;margin:.3em 0;font-size:.8125rem}
.legend li{display:flex;align-items:center;gap:.4em;min-width:0}
.swatch{flex:none;vertical-align:middle}
td .swatch{margin-right:.5em}
details{margin:.5em 0}
summary{cursor:pointer}
pre{margin:.5em 0;padding:.7em .9em;background:var(--box);overflow-x:auto;font-size:.8125rem;line-height:1.45}
pre,.tokens{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.switch{position:absolute;opacity:0}
.tabs{margin:.5em 0;display:flex;flex-wrap:wrap;gap:.4em;align-items:center;font-size:.9rem}
.tabs label{border:1px solid var(--rule);border-radius:4px;padding:.2em .7em;cursor:pointer}
.key{display:none;font-size:.8125rem;margin:.6em 0;gap:0;align-items:center;flex-wrap:wrap}
.key b{font-weight:400;padding:.15em .5em;font-variant-numeric:tabular-nums;border:1px solid var(--rule);
margin-left:-1px}
.key span{margin-right:.7em}
.asked,.response{display:grid;grid-template-columns:15em minmax(0,1fr);gap:0 1em;padding:.2em 0;align-items:baseline}
.asked{border-top:1px solid var(--rule);margin-top:.8em;padding-top:.6em}
.asked p,.response p{font-size:.8125rem;margin:0;color:var(--soft)}
.tokens{font-size:.875rem;line-height:1.9;overflow-wrap:anywhere;white-space:pre-wrap}
.t,.prompt{unicode-bidi:isolate;direction:ltr}
.t{padding:.15em .1em;margin-right:1px;border-radius:2px;box-shadow:inset 0 0 0 1px var(--rule)}
.prompt{color:var(--soft);margin-right:.6em}
@media (max-width:600px){.asked,.response{grid-template-columns:1fr}.chart text{font-size:13px}
main{padding:16px 14px 48px}body{font-size:15px}h1{font-size:1.4rem}}
"""

VIEWS = ("entropy", "covariance", "advantage")
"""What tokens can be coloured by."""


def _switches() -> str:
    """Rules for the chosen and for the focused one of the radio buttons, which stand before what they switch."""
    names = [f"by-{view}" for view in VIEWS] + [f"mark-{i}" for i in ("none", *range(MAX_MARKED))]
    chosen = ",".join(f"#{name}:checked~.tabs [for={name}]" for name in names)
    focused = ",".join(f"#{name}:focus-visible~.tabs [for={name}]" for name in names)
    keys = ",".join(f"#by-{view}:checked~.atlas .of-{view}" for view in VIEWS)
    return (
        f"{chosen}{{background:var(--ink);color:var(--page)}}\n{focused}{{outline:3px solid var(--c0)}}\n"
        f"{keys}{{display:flex}}\n"
    )


_PAPER = """
@media print{body{font-size:10pt}main{max-width:none;padding:0}nav,.tabs{display:none}
.grid{grid-template-columns:1fr 1fr;gap:1em}.asked,.response{grid-template-columns:12em minmax(0,1fr)}
figure,.asked,.response,tr{break-inside:avoid}h2,h3{break-after:avoid}.scroll,pre{overflow:visible}
table{font-size:7.5pt}td{white-space:normal}pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:7.5pt}
.t,.key b,.chart,.swatch{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def _style() -> str:
    colours = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(7))
    return (
        f":root{{{_LIGHT}}}{_RULES}{colours}\n{_scales(False)}\n{_marks()}\n{_switches()}{_PAPER}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}\n{_scales(True)}}}\n"
    )


STYLE = _style()
