"""The program of a grading worker. It imports the standard library and the grader, nothing of jentropy.

`python -P worker_main.py FD`: FD is a socket on which both sides send frames, 8 bytes of length (big endian) and JSON.
The first frame sets the worker up and is answered by `{"ready": true}` or `{"failed": text}`; each further one is a
batch of rows. An answer says what the grader returned, never more than it takes to name the first fault:
`{"values": [...]}`, `{"values": ..., "bad": [row, type, text]}`, `{"length": n}`, `{"type": name}` or
`{"exception": text}`.
"""

import importlib
import importlib.util
import json
import math
import numbers
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

MAX_TEXT = 500
"""Characters of a message about a grader."""

_GRACE = 5.0
"""Seconds after the deadline at which a worker ends by itself, should nobody have ended it."""


def load(target: str) -> Callable[..., Any]:
    """The function that `package.module:name` or `path/to/file.py:name` names."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("jentropy_grader", place)
        if spec is None or spec.loader is None:
            raise ImportError(f"{place} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} is no function")
    return found


def describe(graded: object, num_rows: int) -> dict[str, Any]:
    """What a grader returned for `num_rows` rows, as JSON."""
    if hasattr(graded, "tolist"):
        graded = graded.tolist()  # pyright: ignore[reportAttributeAccessIssue] (an array)
    if not isinstance(graded, (list, tuple)):
        return {"type": type(graded).__name__}
    if len(graded) != num_rows:
        return {"length": len(graded)}
    values: list[float | None] = []
    for row, value in enumerate(graded):
        item = value.item() if hasattr(value, "item") else value
        if item is None:
            values.append(None)
        elif isinstance(item, numbers.Real):
            values.append(_as_float(item))
        else:
            return {"values": values, "bad": [row, type(value).__name__, repr(value)[:MAX_TEXT]]}
    return {"values": values}


def _as_float(number: numbers.Real) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _receive(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise SystemExit(0)
        data += part
    return bytes(data)


def _receive_frame(channel: socket.socket) -> Any:
    return json.loads(_receive(channel, int.from_bytes(_receive(channel, 8), "big")))


def _send_frame(channel: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    channel.sendall(len(data).to_bytes(8, "big") + data)


def _about(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_TEXT]


def _answer(function: Callable[..., Any], rows: dict[str, Any]) -> dict[str, Any]:
    try:
        return describe(function(rows["prompts"], rows["completions"], **rows["fields"]), len(rows["completions"]))
    except Exception as error:  # noqa: BLE001 - a grader's own fault of any kind costs its rows and is reported
        return {"exception": _about(error)}


def main() -> None:
    """Serves until the other side closes the socket."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    setup = _receive_frame(channel)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    sys.path[:] = setup["path"]
    try:
        function = load(setup["target"])
    except Exception as error:  # noqa: BLE001 - whatever the module raises is reported to the other side
        _send_frame(channel, {"failed": _about(error)})
        return
    _send_frame(channel, {"ready": True})
    while True:
        rows = _receive_frame(channel)
        signal.setitimer(signal.ITIMER_REAL, setup["deadline"] + _GRACE)  # ends an orphan, whatever holds the GIL
        answer = _answer(function, rows)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send_frame(channel, answer)


if __name__ == "__main__":
    main()
