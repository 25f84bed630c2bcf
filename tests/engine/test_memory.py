import pytest
import torch

from app.engine import memory
from app.engine.memory import CUDA_HEADROOM, HOST_SHARE, CudaMemory, FixedMemory, host_memory, memory_of
from app.main import buffer_bytes
from app.settings import Settings

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


def test_tensors_and_bodies_together_leave_a_tenth_of_the_machine_to_the_rest(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert host_memory() + buffer_bytes(Settings()) <= 0.9 * 4 * GIB


class Card:
    """A card of 24 GiB, of which others have 4, torch 10, and 6 of these are weights."""

    def __init__(self, monkeypatch):
        self.allocated, self.reserved, self.peak, self.fraction = 6 * GIB, 10 * GIB, 9 * GIB, None
        self.asked = self.emptied = 0
        for name, function in {
            "mem_get_info": self._driver,
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: None,
            "set_per_process_memory_fraction": self._limit,
            "empty_cache": self._empty,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def _driver(self, device):
        self.asked += 1
        return 20 * GIB - self.reserved, 24 * GIB

    def _limit(self, fraction, device):
        self.fraction = fraction

    def _empty(self):
        self.emptied += 1
        self.reserved = self.allocated


def card_memory(limit=None):
    """As a worker has it once the weights are there and were looked at."""
    cuda = memory_of(torch.device("cuda:0"), limit)
    assert isinstance(cuda, CudaMemory)
    cuda.note(cuda.look(), 6 * GIB)
    return cuda


def test_free_on_a_card_is_the_driver_s_and_torch_s_own_cache_less_the_headroom(monkeypatch):
    card = Card(monkeypatch)
    cuda = card_memory()
    assert cuda.free(6 * GIB) == (10 + 10 - 6) * GIB - CUDA_HEADROOM
    assert cuda.capacity() == 24 * GIB - CUDA_HEADROOM
    assert card.fraction is None
    assert cuda.kinds(0) == {"total": 24 * GIB, "free": 10 * GIB, "allocated": 6 * GIB, "reserved": 10 * GIB}


def test_weights_that_come_and_go_are_counted_without_asking_the_driver(monkeypatch):
    """The event loop asks: a driver that hangs must not take liveness with it."""
    card = Card(monkeypatch)
    cuda = card_memory()
    asked = card.asked
    assert cuda.free(2 * GIB) == cuda.free(6 * GIB) + 4 * GIB
    cuda.kinds(0)
    cuda.capacity()
    assert card.asked == asked


def test_a_running_forward_is_not_in_what_is_free_so_that_it_is_counted_once(monkeypatch):
    card = Card(monkeypatch)
    cuda = card_memory()
    before = cuda.free(6 * GIB)
    card.allocated += 3 * GIB  # of a forward, whose forecast the cache subtracts
    card.reserved += 3 * GIB
    assert cuda.free(6 * GIB) == before


def test_a_limit_binds_the_arithmetic_and_the_allocator_alike(monkeypatch):
    card = Card(monkeypatch)
    cuda = card_memory(12 * GIB)
    assert cuda.free(6 * GIB) == (12 - 6) * GIB - CUDA_HEADROOM
    assert card.fraction == 0.5


def test_a_peak_is_counted_from_where_it_began(monkeypatch):
    Card(monkeypatch)
    cuda = card_memory()
    cuda.begin()
    assert cuda.peak() == 3 * GIB


def test_blocks_that_evicted_weights_leave_go_back_to_the_driver_before_the_next_forward(monkeypatch):
    """They belong to the stream that copied the weights, and would serve no forward."""
    card = Card(monkeypatch)
    cuda = card_memory()
    cuda.begin()
    assert card.emptied == 0
    cuda.evicted()
    cuda.begin()
    cuda.begin()
    assert card.emptied == 1


def test_the_fake_is_a_production_choice():
    assert isinstance(memory_of(torch.device("cpu"), None), FixedMemory)
