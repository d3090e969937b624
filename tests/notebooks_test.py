"""The notebooks: each runs in a fresh kernel on a smoke budget, is made of short pieces and stores no outputs."""

import ast
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
import tiny
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LONGEST = 10
"""Lines of a definition, its docstring left out."""
PER_CELL = 300
"""Seconds after which a cell is taken to hang."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])


def read(path):
    """Cells of a notebook: `(kind, text, cell)`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell) for cell in cells]


def definitions(code):
    """Length in lines of every function, class and lambda of a cell, docstrings and decorators left out, by name."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            text = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            found[node.name] = node.end_lineno - node.lineno + 1 - text
        elif isinstance(node, ast.Lambda):
            found[f"lambda in line {node.lineno}"] = node.end_lineno - node.lineno + 1
    return found


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What a kernel finds in its environment: small datasets, caches of this session, no display, a smoke budget."""
    with tiny.own_folders(tmp_path_factory.getbasetemp()), pytest.MonkeyPatch.context() as patch:
        settings = {
            "JENTROPY_SMOKE": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu",
            "TMPDIR": str(tmp_path_factory.mktemp("notebooks")),
            "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
            "JUPYTER_DATA_DIR": str(tmp_path_factory.mktemp("jupyter")),
        }  # fmt: skip
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings


def test_there_are_five():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02d}_" for number in range(1, 6)]


@each_notebook
def test_a_notebook_runs(path, smoke, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=PER_CELL, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert sum("image/png" in output.get("data", {}) or "text/html" in output.get("data", {}) for output in outputs)
    assert not list(tmp_path.iterdir()), "a notebook writes to a temporary folder, not beside itself"
    assert os.listdir(smoke["TMPDIR"]), "and its runs are there"
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@each_notebook
def test_a_notebook_stores_no_outputs(path):
    text = path.read_text(encoding="utf-8")
    nbformat.validate(json.loads(text))
    for kind, _, cell in read(path):
        assert cell["metadata"] == {}
        if kind == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert set(json.loads(text)["metadata"]) <= {"kernelspec", "language_info"}


@each_notebook
def test_a_notebook_begins_with_a_title_and_a_question(path):
    kind, text, _ = read(path)[0]
    title, *_ = text.splitlines()
    assert kind == "markdown" and title.startswith(f"# {path.name[:2]} ")
    assert path.stem[3:] in re.sub(r"\W+", "_", title.lower())
    (question,) = re.findall(r"^\*\*Question: (.+)\*\*$", text, re.MULTILINE)
    assert question.endswith("?")


@each_notebook
def test_nothing_in_a_notebook_is_longer_than_ten_lines(path):
    found = {}
    for kind, text, _ in read(path):
        found |= definitions(text) if kind == "code" else {}
    assert {name: lines for name, lines in found.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("lines", [LONGEST, LONGEST + 1])
def test_the_length_of_a_definition_is_without_its_docstring(lines):
    body = "".join(f"    x = {i}\n" for i in range(lines - 1))
    doc = '    """Two\n    lines."""\n'
    assert definitions(f"def f():\n{doc}{body}\n\n@g\nclass C:\n{body}") == {"f": lines, "C": lines}


@each_notebook
def test_every_section_says_what_a_reader_should_see(path):
    sections = []
    for kind, text, _ in read(path)[2:]:
        if kind == "markdown" and re.search(r"^## ", text, re.MULTILINE):
            sections.append(["", ""])
            text = text[re.search(r"^## ", text, re.MULTILINE).start() :]
        if sections:
            sections[-1][kind == "code"] += text + "\n"
    assert len(sections) >= 3
    silent = [text.splitlines()[0] for text, code in sections if code and "should see" not in " ".join(text.split())]
    assert silent == []


@each_notebook
def test_a_notebook_has_one_switch_for_the_smoke_budget_and_links_that_lead_somewhere(path):
    everything = "\n".join(text for _, text, _ in read(path))
    (switch,) = [line for line in everything.splitlines() if "environ" in line]
    assert switch.startswith('SMOKE = os.environ.get("JENTROPY_SMOKE") == "1"')
    links = re.findall(r"\]\((?!http)([^)#]+)\)", everything)
    files = re.findall(r"\bexperiments/[\w/]+\.\w+", everything)
    missing = [link for link in links if not (path.parent / link).exists()]
    assert missing + [file for file in files if not (path.parent.parent / file).exists()] == []
