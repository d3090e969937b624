"""Type annotations at run time: what a factory or dataclass expects of an argument, and values converted to it."""

import collections.abc
import contextlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

_UNIONS = (typing.Union, types.UnionType)


def annotation(function: Callable[..., Any], name: str) -> Any:
    """The resolved annotation of the argument `name` of a function or class.

    `Any` where there is none or where its names exist for type checkers only.
    """
    function = inspect.unwrap(function)
    parameters = inspect.signature(function).parameters
    extra = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    parameter = parameters.get(name, extra)
    if parameter is None or parameter.annotation is parameter.empty:
        return Any
    bases = inspect.getmro(function) if isinstance(function, type) else (function,)
    owner = next((base for base in bases if name in vars(base).get("__annotations__", {})), function)
    holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
    try:
        return typing.get_type_hints(holder, vars(sys.modules[owner.__module__]))[name]
    except NameError:
        return Any


def element(hint: Any, container: Mapping | list | tuple, name: str) -> Any:
    """The annotation of the member `name` (key or index) of `container`, which is annotated `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        origins = [(a, typing.get_origin(a)) for a in args]
        return element(next((a for a, o in origins if o and isinstance(container, o)), Any), container, name)
    if not args:
        return Any
    if isinstance(container, Mapping):
        return args[1]
    return args[int(name)] if origin is tuple and args[-1] is not ... else args[0]


def admits_none(hint: Any) -> bool:
    """Whether `hint` is a union with None."""
    return typing.get_origin(hint) in _UNIONS and type(None) in typing.get_args(hint)


def describe(hint: Any) -> str:
    """The annotation as one writes it."""
    return inspect.formatannotation(hint).replace("typing.", "").replace("collections.abc.", "")


def convert(value: Any, hint: Any) -> Any:
    """A literal as an instance of `hint`.

    An int becomes a float where a float is expected, and so do the strings `inf`, `-inf` and `nan`; a list becomes a
    tuple. A bool is no int. Of a union, a member of the value's own type comes before members it converts to.

    Raises:
      TypeError: the value does not fit.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        return convert(value, args[0])
    if origin in _UNIONS:
        for arg in sorted(args, key=lambda arg: arg is not type(value)):
            with contextlib.suppress(TypeError):
                return convert(value, arg)
    elif origin is typing.Literal:
        if any(type(arg) is type(value) and arg == value for arg in args):
            return value
    elif hint is float:
        if type(value) in (int, float) or value in ("inf", "-inf", "nan"):
            return float(value)
    elif hint in (bool, int, str, type(None)):
        if type(value) is hint:
            return value
    else:
        return _convert_collection(value, origin or hint, args)
    raise TypeError(f"expected {describe(hint)}, got {value!r}")


def _convert_collection(value: Any, base: Any, args: tuple[Any, ...]) -> Any:
    if base in (tuple, list, collections.abc.Sequence) and isinstance(value, (tuple, list)):
        fixed = base is tuple and args and args[-1] is not ...
        if not fixed or len(args) == len(value):
            hints = args if fixed else [args[0] if args else Any] * len(value)
            return (list if base is list else tuple)(convert(v, h) for v, h in zip(value, hints))
    elif base in (dict, collections.abc.Mapping) and isinstance(value, dict):
        key, member = args or (Any, Any)
        return {convert(k, key): convert(v, member) for k, v in value.items()}
    elif isinstance(base, type) and not vars(base).get("_is_protocol") and isinstance(value, base):
        return value
    raise TypeError(f"expected {base}, got {value!r}")
