"""No module of the package evaluates text, unpickles data or opens a shell (SECURITY.md)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jentropy"
MODULES = sorted(PACKAGE.rglob("*.py"))
BANNED_IMPORTS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
BANNED_BUILTINS = {"eval", "exec", "compile", "__import__"}
BANNED_CALLS = {"sympify", "parse_expr", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
BANNED_KEYWORDS = {"shell", "allow_pickle"}


def offences(source: str) -> list[str]:
    """What a module does that SECURITY.md promises it does not, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in BANNED_IMPORTS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in BANNED_BUILTINS or called in BANNED_CALLS or called.split(".")[-1] in {"sympify", "parse_expr"}:
            found.append(f"{node.lineno}: {called}()")
        for keyword in node.keywords:
            if keyword.arg in BANNED_KEYWORDS and not (
                isinstance(keyword.value, ast.Constant) and not keyword.value.value
            ):
                found.append(f"{node.lineno}: {keyword.arg}=")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_evaluates_nothing(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "from pickle import loads",
        "import cloudpickle.compat",
        "sympy.parse_expr(text)",
        "torch.load(path)",
        "subprocess.run(text, shell=True)",
        "numpy.load(path, allow_pickle=flag)",
    ],
)
def test_the_check_sees_an_offence(source):
    assert len(offences(source)) == 1


@pytest.mark.parametrize(
    "source", ["re.compile(pattern)", "jitted.lower(x).compile()", "numpy.load(path, allow_pickle=False)"]
)
def test_the_check_allows_look_alikes(source):
    assert offences(source) == []
