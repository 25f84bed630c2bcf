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
{setup}
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


def faults(setup: str) -> int:
    script = FAULTS.format(setup=setup)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not GLIBC, reason="the thresholds are glibc's")
def test_freed_pages_stay_in_the_process_until_it_is_told_otherwise():
    kept = faults("allocator.keep_pages()")
    given_back = faults("allocator.keep_pages(); allocator.keep_pages(False)")
    assert kept < 100 < min(given_back, faults(""))


RESIDENT = """
import ctypes
from pathlib import Path
from app import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
allocator.keep_pages()
blocks = [libc.malloc(16 << 20) for _ in range(8)]
for block in blocks: ctypes.memset(block, 1, 16 << 20)
pin = libc.malloc(100)
for block in blocks: libc.free(block)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
allocator.keep_pages(False)
print(before - resident())
"""


@pytest.mark.skipif(not GLIBC, reason="the thresholds are glibc's")
def test_what_was_kept_is_given_back_when_it_keeps_no_longer():
    answer = subprocess.run([sys.executable, "-c", RESIDENT], check=True, capture_output=True, text=True).stdout
    assert int(answer) > 100 << 20  # of 128 MiB, below a block that is still in use


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert allocator.keep_pages() is False
    allocator.give_back()
