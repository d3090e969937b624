"""KNOBS.md: every name in its column "here" exists, with the arguments that it shows."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import jentropy

TEXT = (Path(__file__).parent.parent / "KNOBS.md").read_text(encoding="utf-8")
PLACES = ("advantages", "mechanisms", "rewards", "surrogates", "normalisers", "samplers", "compose", "aliases")
PLACES += ("evaluation", "head", "base", "rollout.dynamic", "train.experiment")
PLACES += ("train.second_models", "preference")


def public():
    """Functions and classes by name, in the modules where they are defined."""
    found = {}
    for place in PLACES:
        module = importlib.import_module(f"jentropy.{place}")
        paths = [f"{module.__name__}.{m.name}" for m in pkgutil.iter_modules(getattr(module, "__path__", []))]
        for path in [module.__name__, *paths]:
            for name, value in vars(importlib.import_module(path)).items():
                if callable(value) and getattr(value, "__module__", None) == path and not name.startswith("_"):
                    found.setdefault(name, []).append(value)
    return found


PUBLIC = public()


def rows():
    """`(knob, what stands in its column "here")` of every table."""
    column = None
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            column = None
        elif "here" in cells:
            column = cells.index("here")
        elif column is not None and not set(cells[0]) <= set(":- "):
            yield cells[0], cells[column]


ROWS = list(rows())


def test_the_tables_are_read():
    assert len(ROWS) > 40 and sum(bool(here) for _, here in ROWS) > 40


def arguments(call):
    return [ast.unparse(x) for x in call.args] + [keyword.arg for keyword in call.keywords]


@pytest.mark.parametrize(("knob", "here"), ROWS, ids=[knob.replace(" ", "_") for knob, _ in ROWS])
def test_names_and_arguments_exist(knob, here):
    del knob
    for span in re.findall(r"`([^`]+)`", here):
        node = ast.parse(span, mode="eval").body
        if isinstance(node, ast.Attribute):
            (owner,) = PUBLIC[ast.unparse(node.value)]
            fields = getattr(owner, "_fields", None) or [field.name for field in dataclasses.fields(owner)]
            assert node.attr in fields, span
            continue
        name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        assert name in PUBLIC, f"{name} does not exist"
        if isinstance(node, ast.Call):
            known = [set(inspect.signature(function).parameters) for function in PUBLIC[name]]
            assert any(set(arguments(node)) <= names for names in known), span


def test_examples_with_values_are_accepted():
    """Calls whose arguments all have values are made."""
    spans = {span for _, here in ROWS for span in re.findall(r"`([^`]+)`", here)}
    made = 0
    for span in sorted(spans):
        node = ast.parse(span, mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            continue
        for function in PUBLIC[ast.unparse(node.func)]:
            if {k.arg for k in node.keywords} <= set(inspect.signature(function).parameters):
                function(**{k.arg: ast.literal_eval(k.value) for k in node.keywords})
                made += 1
    assert made > 20


def test_the_document_names_no_module_that_is_not_there():
    for path in re.findall(r"\]\((jentropy/[^)]+)\)", TEXT):
        assert (Path(jentropy.__file__).parent.parent / path).is_file()
