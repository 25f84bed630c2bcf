"""How glibc's malloc keeps house for torch: fast, or in no more memory than the tensors take. Knows nothing of torch.

By default every tensor over 32 MiB is its own mmap, given back to the kernel when freed and faulted in anew when next
needed: 171 000 page faults in a TAESD decode of 512 px, none when the heap keeps them. The price is memory, as the heap
cannot use every gap (docs/engine.md has the figures); so where memory is short it keeps nothing.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
_INT_MAX = 2**31 - 1

GAPS = 1.9
"""Resident pages over tensors at most, when pages are kept: SD decodes at 512 and 1024 px."""

_OWN_PAGES = 2 << 20
"""Bytes from which a block is an mmap of its own where pages are not kept: nothing of a tensor's size stays behind."""


def keep_pages(keep: bool = True) -> bool:
    """Whether freed pages stay for the next tensor, from now on; False where the C library is not glibc.

    Call it before torch allocates anything, and again at any time; ceasing to keep gives back what was kept.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    threshold = _INT_MAX if keep else _OWN_PAGES
    # One arena: a thread's own arena cannot hold a large tensor and would fall back to mmap.
    done = all(
        libc.mallopt(name, value) == 1
        for name, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, threshold), (M_TRIM_THRESHOLD, threshold))
    )
    if not keep:
        give_back()
    return done


def give_back() -> None:
    """Returns the heap's free pages to the kernel; a no-op where the C library is not glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class Heap:
    """The heap of this process, switched before each forward that needs it otherwise."""

    def __init__(self) -> None:
        self._keeps: bool | None = None  # the process may have begun either way

    def keep(self, keep: bool) -> None:
        """`keep_pages`, where it is not so already."""
        if keep != self._keeps:
            self._keeps = keep
            keep_pages(keep)
