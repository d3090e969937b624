"""Counts compilations of XLA programs, so that a loop can show that it has none after its warm-up."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration: float, **kwargs: object) -> None:
    del duration, kwargs
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def num_compilations() -> int:
    """Programs that this process has compiled or fetched from the persistent cache so far."""
    return _count
