import ctypes
import platform
import subprocess
import sys

import pytest

from app import allocator

GLIBC = platform.libc_ver()[0] == "glibc"
# A large block is freed and taken again: the kernel hands out new pages only if malloc gave the old ones back.
FAULTS = """
import ctypes, resource
from app import allocator
if {keep}: allocator.keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    script = FAULTS.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not GLIBC, reason="the thresholds are glibc's")
def test_freed_pages_stay_in_the_process():
    assert faults(keep=True) < 100 < faults(keep=False)


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert allocator.keep_pages() is False
    allocator.give_back()
