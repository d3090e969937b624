"""Text that nobody can trust, and the page around it."""

import base64
import doctest
import hashlib
import itertools
import re

import pytest

from jentropy.report import html
from jentropy.report.style import STYLE


@pytest.mark.parametrize(
    "string,shown",
    [
        ("plain π 中", "plain π 中"),
        ("a\nb\tc", "a↵b⇥c"),
        ("\x00\x1b[31m\r", "‹NUL›‹ESC›[31m‹CR›"),
        ("\x7f\x85", "‹U+007F›‹U+0085›"),
        ("\u202eabc\u202c\u2066", "‹U+202E›abc‹U+202C›‹U+2066›"),
        ("a\u200bb\u200d\ufeff\u00ad", "a‹U+200B›b‹U+200D›‹U+FEFF›‹U+00AD›"),
        ("\u2028\u2029\u00a0\u3000", "‹U+2028›‹U+2029›‹U+00A0›‹U+3000›"),
        ("\u3164\u2800\ufe0f", "‹U+3164›‹U+2800›‹U+FE0F›"),
        ("\ud800\ue000\U000e0041\ufffe", "‹U+D800›‹U+E000›‹U+E0041›‹U+FFFE›"),
        ("\u0301e\u0301", "‹U+0301›e\u0301"),
        ("e" + "\u0301" * 5, "e\u0301\u0301" + "‹U+0301›" * 3),
    ],
)
def test_what_one_could_not_see_is_shown(string, shown):
    assert html.visible(string) == shown


def test_text_closes_nothing():
    assert html.text("</script><img src=x onerror='a\"b'>&") == (
        "&lt;/script&gt;&lt;img src=x onerror=&#x27;a&quot;b&#x27;&gt;&amp;"
    )


def test_a_table_escapes_all_but_html():
    rows = [{"a": "<b>", "n": 0.12345}, {"a": html.Html("<i>x</i>"), "n": None}]
    found = html.table(rows, {"a": "<h>", "n": "number"})
    assert '<th scope="col">&lt;h&gt;</th><th scope="col" class="num">number</th>' in found
    assert '<td>&lt;b&gt;</td><td class="num">0.123</td>' in found
    assert '<td><i>x</i></td><td class="num">–</td>' in found
    assert html.number(-1.0) == "\u22121.000"


def test_the_policy_of_the_page_allows_its_style_and_nothing_else():
    page = html.page("<t>", "<p>x</p>")
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert f'content="{policy}"' in page and "<title>&lt;t&gt;</title>" in page
    assert re.findall(r"<style>(.*?)</style>", page, re.DOTALL) == [STYLE]
    assert "url(" not in STYLE and "@import" not in STYLE and "</" not in STYLE


def test_braces_of_the_style_are_closed():
    depth = 0
    for character in STYLE:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert 0 <= depth <= 2
    assert depth == 0


def test_scales_go_from_light_to_dark_in_equal_steps():
    def luminance(colour):
        linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear))

    light = STYLE[: STYLE.index("@media screen")]
    for letter, levels in (("e", range(8)), ("v", range(4, 9)), ("v", range(4, -1, -1))):
        rules = [re.search(rf"\.key \.{letter}{i}{{background:(#\w+);color:(#\w+)}}", light) for i in levels]
        lights = [luminance(rule[1]) for rule in rules if rule]
        assert len(lights) == len(levels) and lights == sorted(lights, reverse=True)
        steps = [a ** (1 / 3) - b ** (1 / 3) for a, b in itertools.pairwise(lights)]
        assert max(steps) < 1.6 * min(steps)
        for rule, light_of in zip(rules, lights):
            ink = 1.0 if rule[2] == "#fff" else 0.0
            high, low = sorted((light_of, ink), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5  # the contrast that WCAG 2 asks of text


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(html)
    assert (result.failed, result.attempted) == (0, 1)
