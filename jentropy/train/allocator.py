"""Keeps the temporaries of XLA's CPU programs in the process between calls."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Asks glibc's malloc not to give freed memory back to the kernel; returns whether it will.

    XLA's CPU backend allocates a program's temporaries at every call. Beyond some 128 KiB glibc maps and unmaps them
    each time, and the page faults cost as much as the mathematics of a small policy. Elsewhere than with glibc nothing
    is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
