"""The layers of the package, read from its source: arrows only point down, and the heavy libraries stay up.

L0 base <- L1 statistics, heads, algebra <- L2 methods and theory <- L3 policy, rewards, data <- L4 rollout <- L5 train,
report <- L6 command line. A new module finds its place in `LAYERS` by its package or by one line here.
"""

import ast
import functools
import pathlib
import sys

import pytest

import jentropy

ROOT = pathlib.Path(jentropy.__file__).parent

LAYERS: dict[int, tuple[str, ...]] = {
    0: ("base",),
    1: (
        *("stats", "head", "features", "vocabulary", "ratios", "outcome", "compose", "normalisers", "evaluation"),
        *("tree", "temperature_control", "nucleus", "regression", "fitting", "soft_value"),
    ),
    2: (
        *("advantages", "mechanisms", "surrogates"),
        *("learners", "preference", "etpo", "samplers", "theory", "presets", "conflicts", "aliases"),
    ),
    3: ("policy", "rewards", "data"),
    4: ("rollout",),
    5: ("train", "report"),
    6: ("cli", "embedded", "quickstart"),
    7: ("__init__",),
}
UTILITIES = ("annotations", "config_tree", "config")
"""They know nothing of the rest of the package and may be used anywhere above L2."""

METHOD_LIBRARIES = {"jax", "chex", "numpy", "flax.struct"}
"""What L0 to L2 may import besides the standard library."""

IO_MODULES = {"io", "os", "pathlib", "shutil", "socket", "subprocess", "tempfile", "urllib"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FILES = sorted(ROOT.rglob("*.py"))


def _module(path: pathlib.Path) -> str:
    """`mechanisms.clip_cov` of jentropy/mechanisms/clip_cov.py; a package's own name for its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in FILES}
every_module = pytest.mark.parametrize("module", sorted(MODULES))


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Dotted names of all that the module imports, wherever in it, names taken from a module included."""
    found = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _inner(module: str) -> set[str]:
    """Modules of the package that this one imports."""
    found = set()
    for name in _imports(module):
        if name.partition(".")[0] != "jentropy":
            continue
        name = name.removeprefix("jentropy.")
        while name not in MODULES:
            assert "." in name, f"{module} imports {name} from the package's door"
            name = name.rpartition(".")[0]
        found.add(name)
    return found


def _outer(module: str) -> set[str]:
    """Dotted names from outside the package and the standard library."""
    names = {name for name in _imports(module) if name.partition(".")[0] not in sys.stdlib_module_names}
    return {name for name in names if name.partition(".")[0] != "jentropy"}


def _is_under(name: str, libraries: set[str]) -> bool:
    return any(name == library or name.startswith(f"{library}.") for library in libraries)


def _layer(module: str) -> int | None:
    """The layer, None for a utility."""
    top = module.partition(".")[0]
    if top in UTILITIES:
        return None
    layers = [layer for layer, tops in LAYERS.items() if top in tops]
    assert layers, f"{module} has no layer: add it to LAYERS"
    return layers[0]


def _is_low(module: str) -> bool:
    layer = _layer(module)
    return layer is not None and layer <= 2


@every_module
def test_arrows_point_down(module):
    layer = _layer(module)
    for other in _inner(module):
        below = _layer(other)
        if layer is None:
            assert other in UTILITIES, f"the utility {module} imports {other}"
        elif below is None:
            assert layer > 2, f"{module} (L{layer}) imports the utility {other}"
        else:
            assert below <= layer, f"{module} (L{layer}) imports {other} (L{below})"


def test_no_cycles():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for other in sorted(_inner(module)):
                visit(other, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@every_module
def test_methods_do_not_import_one_another(module):
    if _layer(module) != 2 or module in ("presets", "conflicts", "aliases"):
        return
    for other in _inner(module):
        own = MODULES[module].name == "__init__.py" and other.startswith(f"{module}.")
        assert own or _layer(other) != 2, f"{module} imports its sibling {other}: what both need belongs to L1"


@every_module
def test_methods_import_little(module):
    if not _is_low(module):
        return
    for name in _outer(module):
        assert _is_under(name, METHOD_LIBRARIES), f"{module} imports {name}"
        assert not _is_under(name, {"jax.sharding", "jax.experimental"}), f"{module} imports {name}"
    for name in _imports(module):
        assert name.partition(".")[0] not in IO_MODULES, f"{module} imports {name}"
    calls = {ast.unparse(node.func) for node in ast.walk(_tree(module)) if isinstance(node, ast.Call)}
    assert not calls & {"open", "print", "input"}, f"{module} does I/O"


@every_module
def test_heavy_libraries_have_their_place(module):
    top = module.partition(".")[0]
    homes = {
        "flax.linen": {"policy"},
        "flax.nnx": set(),
        "optax": {"train"},
        "orbax": {"train"},
        "tensorflow_datasets": {"data"},
        "tensorflow": set(),
        "matplotlib": {"report"},
        "torch": set(),
    }
    for library, places in homes.items():
        if any(_is_under(name, {library}) for name in _outer(module)):
            assert top in places, f"{module} imports {library}"


@every_module
def test_mesh_axes_are_named_in_one_place(module):
    if module == "train.sharding" or module.partition(".")[0] == "policy":
        return
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Constant) and node.value in ("data", "fsdp", "tensor"):
            raise AssertionError(f"{module}, line {node.lineno}: names the mesh axis {node.value!r}")
    if _layer(module) is not None and _layer(module) < 5:
        assert not any(_is_under(name, {"jax.sharding"}) for name in _imports(module)), f"{module} knows of a mesh"


def _code_lines(module: str, node: ast.FunctionDef) -> int:
    """Lines of a function without decorators, docstring, comments and blank lines."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return 0
    lines = MODULES[module].read_text().splitlines()
    signature = range(node.lineno, node.body[0].lineno)
    code = [lines[i - 1].strip() for i in (*signature, *range(body[0].lineno, (node.end_lineno or 0) + 1))]
    return sum(bool(line) and not line.startswith("#") for line in code)


@every_module
def test_files_and_functions_are_short(module):
    num_lines = len(MODULES[module].read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{module} has {num_lines} lines: split it by noun"
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.FunctionDef):
            num_lines = _code_lines(module, node)
            assert num_lines <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {num_lines} lines of code"


def test_every_layer_has_its_modules():
    tops = {module.partition(".")[0] for module in MODULES}
    planned = {"tree", "learners", "preference", "samplers", "presets"}
    named = {top for layer in LAYERS.values() for top in layer} | set(UTILITIES)
    assert tops <= named
    assert named - tops <= planned, f"no such module: {sorted(named - tops - planned)}"
