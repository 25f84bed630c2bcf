"""A service's view of a folder that changes under it."""

import asyncio
import os
import shutil
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from app.errors import Unavailable, UnknownModel
from app.store import follow as follow_module
from app.store import store as store_module
from app.store.checkpoint import Checkpoint
from app.store.digests import CACHE, digest_of
from app.store.follow import Follower
from app.store.names import Unreadable
from app.store.store import Look, ModelStore
from tests.store.weights import state_of, under, write

EFFECT_SECONDS = 2.0


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "models" / "VAE" / "a.safetensors", state_of("taesd"))
    return tmp_path / "models"


@pytest.fixture
def other(tmp_path):
    """Another file, outside."""
    return write(tmp_path / "other.safetensors", state_of("taesd", seed=1))


@pytest.fixture
def reads(monkeypatch):
    """How often each file was read whole."""
    counts: Counter[str] = Counter()

    def count(files, check):
        counts[files[0].path.name] += 1
        return digest_of(files, check)

    monkeypatch.setattr(store_module, "digest_of", count)
    return counts


@asynccontextmanager
async def following(folder: Path):
    follower = Follower(ModelStore([folder], "sd1"))
    follower.start()
    try:
        yield follower
    finally:
        await asyncio.wait_for(follower.stop(), 5)


def names(follower: Follower) -> dict[str, str]:
    """{name: hash or error}, without a look."""
    return {
        entry.name: entry.error if isinstance(entry, Unreadable) else entry.sha256 for entry in follower.store.entries()
    }


async def becomes(true, seconds: float = EFFECT_SECONDS) -> float:
    """Seconds until it is so."""
    begun = time.monotonic()
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return time.monotonic() - begun


async def test_changes_take_effect_within_two_seconds_without_a_word(folder, other):
    async with following(folder) as follower:
        assert await follower.first_scan(5)
        assert names(follower).keys() == {"a"}
        before = names(follower)["a"]
        shutil.copy(other, folder / "VAE" / "b.safetensors")
        await becomes(lambda: names(follower).keys() == {"a", "b"})
        (folder / "VAE" / "b.safetensors").rename(folder / "VAE" / "c.safetensors")
        await becomes(lambda: names(follower).keys() == {"a", "c"})
        shutil.copy(other, folder / "VAE" / "a.part")
        (folder / "VAE" / "a.part").replace(folder / "VAE" / "a.safetensors")
        await becomes(lambda: names(follower)["a"] != before)
        write(folder / "VAE" / "a.safetensors", state_of("taesd"))  # in place
        await becomes(lambda: names(follower)["a"] == before)
        (folder / "VAE" / "c.safetensors").unlink()
        await becomes(lambda: names(follower).keys() == {"a"})
        (folder / "checkpoints" / "new").mkdir(parents=True)
        shutil.copy(other, folder / "checkpoints" / "new" / "d.safetensors")
        await becomes(lambda: names(follower).keys() == {"a", "d"})
        (folder / "VAE" / "a.json").write_text('{"scaling_factor": 2.0}')
        await becomes(lambda: follower.store.resolve("a").family.latent_format.scaling_factor == 2.0)


async def test_a_file_that_is_written_slowly_is_read_once_and_never_an_error(folder, other, reads):
    content = other.read_bytes()
    path = folder / "VAE" / "slow.safetensors"
    async with following(folder) as follower:
        await follower.first_scan(5)
        seen: set[str] = set()
        with path.open("wb") as file:
            for begin in range(0, len(content), len(content) // 10):
                file.write(content[begin : begin + len(content) // 10])
                file.flush()
                await asyncio.sleep(0.15)
                seen |= names(follower).keys()
        assert seen == {"a"}
        await becomes(lambda: "slow" in names(follower))
        assert isinstance(follower.store.resolve("slow"), Checkpoint)
        assert reads["slow.safetensors"] == 1


async def test_the_old_entry_stays_while_its_file_is_written_anew_with_pauses(folder, other, reads):
    path = folder / "VAE" / "a.safetensors"
    content = other.read_bytes()
    async with following(folder) as follower:
        await follower.first_scan(5)
        before = names(follower)
        with path.open("wb") as file:
            for begin, pause in ((0, 0.1), (1, 1.0), (2, 0.1)):
                file.write(content[begin * len(content) // 3 : (begin + 1) * len(content) // 3])
                file.flush()
                for _ in range(5):
                    await asyncio.sleep(pause / 5)
                    assert names(follower) == before
        await becomes(lambda: names(follower) != before)
        assert isinstance(follower.store.resolve("a"), Checkpoint)
        assert reads["a.safetensors"] == 2  # before and after


async def test_a_file_that_stays_broken_is_listed_with_its_error_and_heals(folder, other):
    path = folder / "VAE" / "b.safetensors"
    async with following(folder) as follower:
        await follower.first_scan(5)
        path.write_bytes(other.read_bytes()[:-1])
        await becomes(lambda: "truncated" in names(follower).get("b", ""))
        with path.open("ab") as file:
            file.write(other.read_bytes()[-1:])
        await becomes(lambda: isinstance(follower.store.entries()[1], Checkpoint))


async def test_a_file_just_copied_is_found_by_the_first_who_asks(folder, other):
    async with following(folder) as follower:
        await follower.first_scan(5)
        shutil.copy(other, folder / "VAE" / "b.safetensors")
        assert (await follower.find("b", None)).name == "b"
        begun = time.monotonic()
        with pytest.raises(UnknownModel):
            await follower.find("c", None)
        assert time.monotonic() - begun < 1


async def test_a_list_waits_for_a_file_just_written_whole_or_not_and_not_for_one_that_is_written_on(
    folder, other, monkeypatch
):
    async with following(folder) as follower:
        await follower.first_scan(5)
        monkeypatch.setattr(follow_module, "PATIENCE_SECONDS", 30)  # it ends as soon as both are decided
        shutil.copy(other, folder / "VAE" / "b.safetensors")
        (folder / "VAE" / "c.safetensors").write_text("torn")
        assert [type(entry) for entry in await follower.entries()] == [Checkpoint, Checkpoint, Unreadable]
        monkeypatch.setattr(follow_module, "PATIENCE_SECONDS", 1)
        path = folder / "VAE" / "d.safetensors"
        for size in range(15):
            path.write_bytes(bytes(size))
            await follower.look()  # as a request does
            await asyncio.sleep(0.1)
        begun = time.monotonic()
        assert [entry.name for entry in await follower.entries()] == ["a", "b", "c"]
        assert time.monotonic() - begun < 0.9  # patience has ended while it was written


async def test_a_file_moved_in_is_listed_at_once(folder, other):
    os.utime(other, ns=(10**18, 10**18))
    async with following(folder) as follower:
        await follower.first_scan(5)
        other.rename(folder / "VAE" / "b.safetensors")
        assert [entry.name for entry in await follower.entries()] == ["a", "b"]
        (folder / "VAE" / "b.safetensors").unlink()
        assert [entry.name for entry in await follower.entries()] == ["a"]


async def test_a_removed_file_is_unknown_from_the_next_request_on(folder):
    async with following(folder) as follower:
        assert (await follower.find("a", None)).name == "a"
        (folder / "VAE" / "a.safetensors").unlink()
        with pytest.raises(UnknownModel):
            await follower.find("a", None)


async def test_a_folder_that_is_not_there_is_picked_up_when_it_appears(tmp_path, other):
    folder = tmp_path / "not" / "yet"
    async with following(folder) as follower:
        assert await follower.first_scan(5)
        assert await follower.entries() == []
        (folder / "VAE").mkdir(parents=True)
        shutil.copy(other, folder / "VAE")
        await becomes(lambda: names(follower).keys() == {"other"})
        shutil.rmtree(folder)
        await becomes(lambda: not names(follower))
        (folder / "VAE").mkdir(parents=True)
        shutil.copy(other, folder / "VAE")
        await becomes(lambda: names(follower).keys() == {"other"})


async def test_links_are_followed_to_where_they_lead(folder, other, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(other, elsewhere / "b.safetensors")
    async with following(folder) as follower:
        await follower.first_scan(5)
        (folder / "VAE" / "linked").symlink_to(elsewhere)
        (folder / "VAE" / "alias.safetensors").symlink_to(other)
        await becomes(lambda: names(follower).keys() == {"a", "alias", "b"})
        before = names(follower)["alias"]
        write(elsewhere / "c.safetensors", state_of("taesd", seed=5))
        await becomes(lambda: "c" in names(follower))
        write(other, state_of("taesd", seed=6))
        await becomes(lambda: names(follower)["alias"] != before)


# -- the first scan ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """Holds whole reads of files called `big`."""
    gate = threading.Event()

    def hold(files, check):
        while files[0].path.stem == "big" and not gate.wait(0.02):
            check()
        return digest_of(files, check)

    monkeypatch.setattr(store_module, "digest_of", hold)
    yield gate
    gate.set()


@pytest.fixture
def big(folder, monkeypatch):
    """A full checkpoint, large as such things are counted here."""
    state = under("first_stage_model.")(state_of()) | {
        "model.diffusion_model.out.2.weight": state_of()["decoder.conv_in.weight"]
    }
    path = write(folder / "Stable-diffusion" / "big.safetensors", state)
    monkeypatch.setattr(follow_module, "LARGE_BYTES", path.stat().st_size)
    return path


async def test_small_files_are_there_while_large_ones_are_read(folder, big, gate, other):
    async with following(folder) as follower:
        await becomes(lambda: names(follower).keys() == {"a"})
        assert not await follower.first_scan(0.1)
        assert (await follower.find("a", None)).name == "a"
        assert [entry.name for entry in await follower.entries()] == ["a"]
        shutil.copy(other, folder / "VAE" / "b.safetensors")
        await becomes(lambda: "b" in names(follower))  # it does not wait for the large one
        asked = asyncio.ensure_future(follower.find("big", None))
        with pytest.raises(Unavailable, match="still being read: no model 'nothing'; there are: a, b so far"):
            await follower.find("nothing", None)
        with pytest.raises(Unavailable, match="still being read"):
            await asked
        with pytest.raises(Unavailable, match="name a model"):  # the large one may be what is meant
            await follower.find(None, None)
        assert (await follower.find(None, "a")).name == "a"
        gate.set()
        assert await follower.first_scan(5)
        assert (await follower.find("big", None)).baked
        with pytest.raises(UnknownModel):
            await follower.find("nothing", None)


async def test_a_stop_does_not_wait_for_a_large_file(folder, big, gate):
    async with following(folder) as follower:
        await becomes(lambda: names(follower).keys() == {"a"})
    assert not follower.scanned


async def test_a_file_that_is_being_written_at_the_start_does_not_hold_it_up(folder, other, monkeypatch):
    monkeypatch.setattr(follow_module, "FIRST_SECONDS", 0.5)
    path = folder / "VAE" / "b.safetensors"
    async with following(folder) as follower:
        for size in range(10):
            path.write_bytes(other.read_bytes()[: size + 1])
            await asyncio.sleep(0.1)
        assert follower.scanned
        assert names(follower).keys() == {"a"}


# -- how it looks ----------------------------------------------------------------------------------------------------


async def test_a_look_that_takes_long_is_followed_by_a_longer_pause(folder, monkeypatch):
    monkeypatch.setattr(follow_module, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(follow_module, "CHEAP_SECONDS", 0.001)
    async with following(folder) as follower:
        await follower.first_scan(5)
        looks: list[float] = []

        def slow():
            looks.append(time.monotonic())
            time.sleep(0.02)
            return Look({}, settling=False)

        monkeypatch.setattr(follower.store, "look", slow)
        await becomes(lambda: len(looks) >= 3, 5)
    assert all(after - before >= 0.2 for before, after in pairwise(looks))


async def test_five_thousand_files_that_are_no_models_are_ready_soon(folder):
    for index in range(5000):
        (folder / "VAE" / f"{index}.safetensors").write_bytes(b"12345")
    async with following(folder) as follower:
        assert await follower.first_scan(15)
        assert len(names(follower)) == 5001


def test_a_look_at_files_that_stay_works_nothing_out_anew(folder, monkeypatch):
    """It costs a stat each: a folder of 5,000 files is looked at every second."""
    store = ModelStore([folder], "sd1")
    store.scan()
    store.look()
    for work in ("sources", "listed", "identify_source"):
        monkeypatch.setattr(store_module, work, None)  # would fail if called
    for _ in range(3):
        assert store.look() == Look({}, settling=False)


async def test_a_bug_in_reading_a_file_stops_nothing(folder, other, monkeypatch, caplog):
    def fail(files, check):
        if files[0].path.name == "a.safetensors":
            raise RuntimeError("bug")
        return digest_of(files, check)

    monkeypatch.setattr(store_module, "digest_of", fail)
    shutil.copy(other, folder / "VAE" / "b.safetensors")
    async with following(folder) as follower:
        assert await follower.first_scan(5)
        found = names(follower)
        assert "unexpected" in found["a"]
        assert len(found["b"]) == 64
    assert "a.safetensors" in caplog.text


async def test_looks_that_are_asked_for_at_once_are_shared(folder, monkeypatch):
    async with following(folder) as follower:
        await follower.first_scan(5)
        looks, look = Counter[str](), follower.store.look

        def count():
            looks["all"] += 1
            return look()

        monkeypatch.setattr(follower.store, "look", count)
        await asyncio.gather(*(follower.look() for _ in range(50)))
        assert 1 <= looks["all"] <= 3


async def test_a_bug_in_a_look_stops_nothing(folder, other, monkeypatch, caplog):
    async with following(folder) as follower:
        await follower.first_scan(5)
        look, failed = follower.store.look, threading.Event()

        def fail():
            if not failed.is_set():
                failed.set()
                raise RecursionError("bug")
            return look()

        monkeypatch.setattr(follower.store, "look", fail)
        (folder / "VAE" / "b.txt").touch()
        await becomes(failed.is_set)
        shutil.copy(other, folder / "VAE" / "b.safetensors")
        await becomes(lambda: names(follower).keys() == {"a", "b"})
    assert "a bug met in looking at" in caplog.text


async def test_a_pipe_in_the_folder_holds_up_nothing(folder):
    os.mkfifo(folder / "VAE" / "b.ckpt")
    os.mkfifo(folder / CACHE)
    async with following(folder) as follower:
        assert await follower.first_scan(5)
        assert names(follower).keys() == {"a"}


async def test_a_file_whose_name_is_not_utf_8_leaves_others_found(folder, other):
    async with following(folder) as follower:
        await follower.first_scan(5)
        shutil.copy(other, folder / "VAE" / os.fsdecode(b"caf\xe9.safetensors"))
        await becomes(lambda: "caf\\xe9" in names(follower))
        shutil.copy(other, folder / "VAE" / "b.safetensors")
        assert (await follower.find("b", None)).name == "b"
        assert (await follower.find("caf\\xe9", None)).name == "caf\\xe9"
