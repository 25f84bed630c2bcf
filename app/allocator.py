"""Tells glibc's malloc to keep the pages that torch frees. Knows nothing of torch; call it before torch allocates.

By default every tensor over 32 MiB is its own mmap, given back to the kernel when freed and faulted in anew when
next needed: 171 000 page faults in a TAESD decode of 512 px, none with these thresholds. The price is memory: the heap
cannot use every gap (docs/engine.md has the figures).
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
_INT_MAX = 2**31 - 1


def keep_pages() -> bool:
    """Sets the thresholds for this process; False where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # One arena: a thread's own arena cannot hold a large tensor and would fall back to mmap.
    return all(
        libc.mallopt(name, value) == 1
        for name, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, _INT_MAX), (M_TRIM_THRESHOLD, _INT_MAX))
    )


def give_back() -> None:
    """Returns the heap's free pages to the kernel; a no-op where the C library is not glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
