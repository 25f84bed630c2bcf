import pytest
import torch

from app.engine import memory
from app.engine.memory import CUDA_HEADROOM, HOST_SHARE, CudaMemory, FixedMemory, host_memory, memory_of

GIB = 1 << 30


def test_a_fixed_memory_is_its_limit_less_the_weights():
    fixed = memory_of(torch.device("cpu"), 1000)
    assert (fixed.capacity(), fixed.free(300)) == (1000, 700)
    assert fixed.kinds(300) == {"total": 1000, "free": 700, "allocated": 300, "reserved": 300}
    fixed.begin()
    assert fixed.peak() is None
    fixed.release()


def test_cpu_devices_share_the_host_but_each_has_a_limit_that_was_set():
    cpu = torch.device("cpu")
    assert memory_of(cpu, None, 2).capacity() == host_memory() // 2
    assert memory_of(cpu, 1000, 2).capacity() == 1000


@pytest.mark.parametrize(("written", "bounds"), [("max\n", False), (f"{GIB}\n", True), (f"{1 << 60}\n", False)])
def test_a_container_s_limit_counts_where_it_is_the_smaller(tmp_path, monkeypatch, written, bounds):
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "none")
    machine = host_memory()
    assert machine > GIB * HOST_SHARE
    (tmp_path / "memory.max").write_text(written)
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert host_memory() == (int(GIB * HOST_SHARE) if bounds else machine)


class Card:
    """A card of 24 GiB, of which others have 4, torch 10, and 6 of these are in use."""

    def __init__(self, monkeypatch):
        self.allocated, self.peak, self.fraction = 6 * GIB, 9 * GIB, None
        for name, function in {
            "mem_get_info": lambda device: (10 * GIB, 24 * GIB),
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: 10 * GIB,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: None,
            "set_per_process_memory_fraction": self._limit,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def _limit(self, fraction, device):
        self.fraction = fraction


def test_free_on_a_card_is_the_driver_s_and_torch_s_own_cache_less_the_headroom(monkeypatch):
    card = Card(monkeypatch)
    cuda = memory_of(torch.device("cuda:0"), None)
    assert isinstance(cuda, CudaMemory)
    assert cuda.free(123) == (10 + 10 - 6) * GIB - CUDA_HEADROOM
    assert cuda.capacity() == 24 * GIB - CUDA_HEADROOM
    assert card.fraction is None
    assert cuda.kinds(0) == {"total": 24 * GIB, "free": 10 * GIB, "allocated": 6 * GIB, "reserved": 10 * GIB}


def test_a_limit_binds_the_arithmetic_and_the_allocator_alike(monkeypatch):
    card = Card(monkeypatch)
    cuda = memory_of(torch.device("cuda:0"), 12 * GIB)
    assert cuda.free(0) == (12 - 6) * GIB - CUDA_HEADROOM
    assert card.fraction == 0.5


def test_a_peak_is_counted_from_where_it_began(monkeypatch):
    Card(monkeypatch)
    cuda = memory_of(torch.device("cuda:0"), None)
    cuda.begin()
    assert cuda.peak() == 3 * GIB


def test_the_fake_is_a_production_choice():
    assert isinstance(memory_of(torch.device("cpu"), None), FixedMemory)
