"""Config trees as data: members by name, text of a node, a completed copy."""

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import fiddle as fdl
from fiddle import daglish

UNSET = inspect.Parameter.empty


class ConfigError(ValueError):
    """A config that cannot be loaded, changed, hashed or built; the message names the place."""


def as_config(value: Any) -> Any:
    """A dataclass instance or `functools.partial` as the config that builds it; anything else as it is."""
    if isinstance(value, functools.partial):
        return fdl.Partial(value.func, *value.args, **value.keywords)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fdl.Config(type(value), **{f.name: vars(value)[f.name] for f in dataclasses.fields(value) if f.init})
    return value


def _default(node: fdl.Buildable, parameter: inspect.Parameter) -> Any:
    cls = fdl.get_callable(node)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    factory = next((f.default_factory for f in fields if f.name == parameter.name), dataclasses.MISSING)
    return parameter.default if factory is dataclasses.MISSING else factory()


def members(node: Any) -> dict[str, Any]:
    """Members of a config, mapping or sequence by name: arguments with their defaults, `UNSET` where there is none."""
    if isinstance(node, fdl.Buildable):
        given = {str(name): value for name, value in node.__arguments__.items()}
        parameters = node.__signature_info__.parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        return {p.name: given[p.name] if p.name in given else _default(node, p) for p in named} | given
    if isinstance(node, Mapping):
        return {str(key): value for key, value in node.items()}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node))
    return {str(i): value for i, value in enumerate(node)} if isinstance(node, (list, tuple)) else {}


def show(node: Any) -> str:
    """A leaf as a literal or by its qualified name, a config by the name of its callable, a container by its type."""
    if isinstance(node, fdl.Buildable):
        name = show(fdl.get_callable(node))
        return f"partial({name}, ...)" if isinstance(node, fdl.Partial) else f"{name}(...)"
    if node is UNSET:
        return "unset"
    if hasattr(node, "__qualname__"):
        return f"{node.__module__}.{node.__qualname__}"
    return type(node).__name__ if members(node) else repr(node)


def complete(config: fdl.Config) -> fdl.Config:
    """A copy with every default filled in, as a tree: what is used in two places is copied."""

    def fill(node: Any, state: daglish.State) -> Any:
        node = as_config(node)
        if isinstance(node, fdl.Buildable):
            node = copy.copy(node)
            for name, value in members(node).items():
                if value is not UNSET and name not in map(str, node.__arguments__):
                    setattr(node, name, value)
        return state.map_children(node) if state.is_traversable(node) else node

    return daglish.BasicTraversal.run(fill, config)


def dotted(path: str) -> str:
    """Fiddle's `.stages[1].weights['x']` as `stages.1.weights.x`."""
    return re.sub(r"\[['\"]?(.*?)['\"]?\]", r".\1", path).lstrip(".") or "."
