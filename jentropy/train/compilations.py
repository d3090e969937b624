"""Counts compilations of XLA programs, so that a loop can show that it has none after its warm-up."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **metadata: str | int) -> None:
    del duration_secs, metadata
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def num_compilations() -> int:
    """Programs that this process has compiled or fetched from the persistent cache so far."""
    return _count
