"""Experiment configs: `fdl.Config` trees built in Python files, changed from the command line, printed and hashed.

A config file defines `get_config()`, which returns an `fdl.Config` of frozen dataclasses and factory functions. The
names in a dotted path are arguments, keys of mappings and indices of sequences: `stages.0.objective.temperature`.
"""

import ast
import contextlib
import copy
import difflib
import hashlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
from fiddle import daglish
from fiddle.experimental import serialization

from jentropy import annotations
from jentropy.config_tree import UNSET, ConfigError, as_config, complete, dotted, members, show

_MAX_VALUE_LENGTH = 2000
_folders: dict[str, Path] = {}  # modules that configs brought into sys.modules, and the folder of each


def load_config(path: str | Path) -> fdl.Config:
    """What `get_config()` of the Python file at `path` returns.

    The file is run anew on every call, with its stem as module name. While it runs its folder is importable, so that
    configs can share a sibling module; siblings that configs of another folder imported are forgotten first.

    Raises:
      ConfigError: no such file, the name of a module imported from elsewhere, no `get_config`, or no `fdl.Config`.
    """
    path = Path(path).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"config {path}: no such Python file")
    name = path.stem.replace(".", "_")
    imported = sys.modules.get(name)
    if name not in _folders and imported is not None and imported.__file__ != str(path):
        raise ConfigError(f"config {path}: a module named {name!r} is already imported; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.pop(name, None)
    with _importable(path.parent):
        sys.modules[name] = module
        spec.loader.exec_module(module)
        make = vars(module).get("get_config")
        if not callable(make):
            raise ConfigError(f"config {path}: defines no function get_config()")
        config = make()
    if not isinstance(config, fdl.Config):
        raise ConfigError(f"config {path}: get_config() must return an fdl.Config, got {type(config).__name__}")
    return config


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts `folder` first on the import path and forgets the modules of other config folders."""
    for name in [name for name, other in _folders.items() if other != folder]:
        sys.modules.pop(name, None)
        del _folders[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        new = {name: sys.modules[name] for name in set(sys.modules) - before}
        files = {name: vars(module).get("__file__") for name, module in new.items()}
        _folders.update({name: folder for name, file in files.items() if file and Path(file).parent == folder})


def apply_overrides(config: fdl.Config, overrides: Iterable[str]) -> fdl.Config:
    """A deep copy of `config` with `path.to.field=value` assignments applied in order.

    Values are Python literals; what is none is a string, so `name=plain` needs no quotes. They are checked against the
    annotations of the factory or dataclass and converted as `annotations.convert` does. Members of mappings and
    sequences must exist already. A node that is used in two places changes in both.

    Raises:
      ConfigError: unknown field (with the nearest valid name and all valid ones), ill-typed value, or a value for a
        field that holds a config or a function; only None may replace these, where the annotation admits it.
    """
    config = copy.deepcopy(config)
    for override in overrides:
        path, separator, text = override.partition("=")
        path = path.strip()
        if not separator or not path:
            raise ConfigError(f"override {override!r}: expected path.to.field=value")
        config = _assign(config, path.split("."), _parse(path, text.strip()), path, Any)
    return config


def _parse(path: str, text: str) -> Any:
    if len(text) > _MAX_VALUE_LENGTH:
        raise ConfigError(f"{path}: value of {len(text)} characters, at most {_MAX_VALUE_LENGTH} are read")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _assign(node: Any, names: Sequence[str], value: Any, path: str, hint: Any) -> Any:
    """`node`, annotated `hint`, with the member at `names` replaced; `path` is the whole path, for messages."""
    node = as_config(node)
    name, *rest = names
    fields = members(node)
    where = ".".join(path.split(".")[: -len(names)]) or "the config"
    if not fields:
        raise ConfigError(f"{path}: {where} ({show(node)}) has no fields, so no {name!r}")
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
        valid = ", ".join(fields)
        raise ConfigError(f"{path}: {where} ({show(node)}) has no {name!r}; did you mean {nearest!r}? Valid: {valid}")
    current = fields[name]
    if isinstance(node, fdl.Buildable):
        inner = annotations.annotation(fdl.get_callable(node), name)
    else:
        inner = annotations.element(hint, node, name)
    new = _assign(current, rest, value, path, inner) if rest else _checked(current, value, path, inner)
    if isinstance(node, fdl.Buildable):
        setattr(node, name, new)
        return node
    if isinstance(node, Mapping):
        return {key: new if str(key) == name else old for key, old in node.items()}
    items = [new if key == name else old for key, old in fields.items()]
    return node._make(items) if hasattr(node, "_make") else type(node)(items)


def _checked(current: Any, value: Any, path: str, hint: Any) -> Any:
    nodes = [as_config(node) for node, _ in daglish.iterate(current)] if current is not UNSET else []
    fixed = any(isinstance(node, fdl.Buildable) or callable(node) for node in nodes)
    if fixed and not (value is None and annotations.admits_none(hint)):
        raise ConfigError(f"{path}: holds {show(as_config(current))}, which no plain value replaces, got {value!r}")
    try:
        return annotations.convert(value, hint)
    except TypeError:
        expected = annotations.describe(hint)
        raise ConfigError(f"{path}: expected {expected}, got {value!r} ({type(value).__name__})") from None


def flatten(config: fdl.Config) -> list[str]:
    """A line `path = value` for every node and leaf, defaults included; functions and classes as `module.name`.

    The root's path is `.`; the other paths are those of `apply_overrides`.
    """

    def lines(node: Any, path: str) -> Iterator[str]:
        fields = members(node)
        if isinstance(node, fdl.Buildable) or not fields:
            yield f"{path or '.'} = {show(node)}"
        for name, value in fields.items():
            if value is not UNSET:
                yield from lines(value, f"{path}.{name}" if path else name)

    return list(lines(complete(config), ""))


def write_lines(path: str | Path, lines: Sequence[str]) -> None:
    """Writes a flattened config, one line each."""
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(path: str | Path) -> list[str]:
    """Reads what `write_lines` wrote."""
    return Path(path).read_text(encoding="utf-8").splitlines()


def diff(old: Sequence[str], new: Sequence[str]) -> str:
    """The unified diff of two flattened configs, empty if they are equal."""
    return "\n".join(difflib.unified_diff(old, new, "old", "new", lineterm="", n=0))


def identity(config: fdl.Config) -> str:
    """The sha256 (64 hex digits) of `dump(config)`, equal in every process."""
    return hashlib.sha256(dump(config).encode()).hexdigest()


def dump(config: fdl.Config) -> str:
    """The config with all its defaults as fiddle's JSON, one text for what builds the same.

    The order in which declared arguments were given does not count, nor whether a default was written out. The order
    of mappings and of further keywords does, as in a chain, where it is the order of application.

    Raises:
      ConfigError: a lambda or local function, a set (it has no order), or another value that has no stable text.
    """
    tree = complete(config)
    for node, place in daglish.iterate(tree):
        path = dotted(daglish.path_str(place))
        function = fdl.get_callable(node) if isinstance(node, fdl.Buildable) else node
        if isinstance(node, (set, frozenset)):
            raise ConfigError(f"{path}: a set has no stable order, use a tuple")
        if callable(function) and "<" in show(function):
            raise ConfigError(f"{path}: {show(function)} has no name of its own, use a function of a module")
        if callable(function) and not isinstance(function, (type, types.FunctionType, types.MethodType)):
            _register(function, path)
    try:
        return serialization.dump_json(tree)
    except (serialization.UnserializableValueError, serialization.PyrefPolicyError, ImportError, AttributeError) as e:
        raise ConfigError(f"the config cannot be hashed: {e}") from e


class _OwnModules(serialization.DefaultPyrefPolicy):
    """Lets a config's JSON name what is in jentropy, fiddle or Python's own types, and nothing else."""

    def allows_import(self, module: str, symbol: str) -> bool:
        return module.partition(".")[0] in ("jentropy", "fiddle", "builtins", "collections")


def load(path: str | Path) -> fdl.Config:
    """Reads what `dump` wrote to `path`, without importing anything but jentropy.

    Raises:
      ConfigError: not such a file, or it names functions of other modules.
    """
    try:
        return serialization.load_json(Path(path).read_text(encoding="utf-8"), _OwnModules())
    except (serialization.DeserializationError, serialization.PyrefPolicyError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from error


def _register(function: Any, path: str) -> None:
    """Lets fiddle write a wrapped function (`functools.lru_cache`, `jax.jit`) by its name."""
    try:
        serialization.register_constant(function.__module__, function.__qualname__, compare_by_identity=False)
    except (serialization.PyrefPolicyError, ImportError, AttributeError) as error:
        raise ConfigError(f"{path}: {function!r} cannot be imported by name: {error}") from error


def build(config: fdl.Config) -> Any:
    """`fdl.build(config)`, in which a TypeError or ValueError of a factory becomes a ConfigError naming the node."""
    try:
        return fdl.build(config)
    except (TypeError, ValueError) as error:
        message, _, context = str(error).partition("\n\nFiddle context: ")
        place = re.match(r"failed to construct or call (.*?) at <root>(.*?) with positional arguments", context)
        where = f"{dotted(place[2])} ({place[1]}): " if place else ""
        raise ConfigError(f"{where}{message}") from error
