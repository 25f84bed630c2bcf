"""One digest for the same weights in any form, and digests that are kept for as long as the files stay as they are."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from app.errors import Unavailable
from app.store import store as store_module
from app.store.checkpoint import Checkpoint
from app.store.digests import CACHE, Digest, DigestCache, digest_of
from app.store.store import ModelStore
from app.store.tree import stamp
from app.weights.files import open_weights
from tests.store.weights import SUFFIXES, as_diffusers, state_of, under, write

SOME = Digest("a" * 64, (), "b" * 64)


def digest(*paths: Path) -> Digest:
    return digest_of([open_weights(path) for path in paths])


def tensors(path: Path, state) -> str:
    return digest(write(path, state)).tensors


# -- over the tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "flux2", "taesd"])
def test_every_form_and_layout_of_the_same_weights_has_one_digest(tmp_path, family):
    state = state_of(family)
    wanted = tensors(tmp_path / "x.safetensors", state)
    forms = {
        "half": {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
        "double": {key: value.double() if value.is_floating_point() else value for key, value in state.items()},
        "diffusers": as_diffusers(state),
        "inside": under("first_stage_model.")(state) | {"model.diffusion_model.out.2.weight": torch.zeros(3)},
        "reversed": dict(reversed(state.items())),
        "trained": state | {"loss.logvar": torch.zeros(())},
    }
    assert {name: tensors(tmp_path / f"{name}.pt", form) for name, form in forms.items()} == dict.fromkeys(
        forms, wanted
    )
    for suffix in SUFFIXES:
        assert tensors(tmp_path / f"x{suffix}", state) == wanted


def test_a_pair_of_halves_is_what_both_in_one_file_are(tmp_path):
    state = state_of("taesd")
    halves = []
    for half in ("encoder", "decoder"):
        bare = {key.removeprefix(f"{half}."): value for key, value in state.items() if key.startswith(half)}
        halves.append(write(tmp_path / f"tiny_{half}.pth", bare))
    assert digest(*halves).tensors == tensors(tmp_path / "x.safetensors", state)


def test_the_counter_is_left_out_and_a_nan_is_a_nan(tmp_path):
    state = state_of("flux2")
    wanted = tensors(tmp_path / "x.pt", state)
    state["bn.num_batches_tracked"] = torch.tensor(7)
    assert tensors(tmp_path / "y.pt", state) == wanted
    bits = [torch.tensor([pattern], dtype=torch.int16).view(torch.float16) for pattern in (0x7E00, 0x7E01, -0x1FF)]
    assert all(value.isnan() for value in bits)
    digests = {tensors(tmp_path / "n.pt", state | {"decoder.conv_out.bias": value.repeat(3)}) for value in bits}
    assert len(digests) == 1


def test_other_weights_names_or_shapes_have_other_digests(tmp_path):
    state = state_of()
    bias = state["decoder.conv_out.bias"]
    others = [
        state,
        state | {"decoder.conv_out.bias": bias + 0.01},
        state | {"decoder.conv_out.bias": bias[:2]},
        state | {"decoder.conv_out.bias": bias.reshape(3, 1)},
        {key.replace("conv_out.bias", "conv_out.bias2"): value for key, value in state.items()},
        {key: value for key, value in state.items() if key != "decoder.conv_out.bias"},
    ]
    assert len({tensors(tmp_path / "x.pt", other) for other in others}) == len(others)


def lines(state) -> str:
    """The tensors' digest as it has always been taken, straight from a state dict of LDM names."""
    text = ""
    for name in sorted(state):
        half = state[name].half().contiguous()
        shape = tuple(half.shape[:2] if half.shape[2:] == (1, 1) else half.shape)
        text += f"{name} {'x'.join(map(str, shape))} {hashlib.sha256(half.numpy().tobytes()).hexdigest()}\n"
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_both_digests_are_what_they_have_always_been(tmp_path, suffix):
    state = state_of()
    base = torch.cat([state["encoder.conv_out.bias"], state["decoder.conv_out.bias"]])
    odd = {
        "turned": state
        | {"decoder.conv_in.weight": state["decoder.conv_in.weight"].to(memory_format=torch.channels_last)},
        "shared": state | {"encoder.conv_out.bias": base[:8], "decoder.conv_out.bias": base[8:]},
        "overlapping": state | {"encoder.conv_out.bias": base[:8], "decoder.conv_out.bias": base[4:7]},
        "strided": state | {"encoder.conv_out.bias": torch.arange(16.0)[::2], "decoder.conv_out.bias": base[:9:3]},
        "empty": state | {"decoder.conv_out.bias": torch.zeros(0)},
    }
    for name, form in odd.items():
        path = write(tmp_path / f"{name}{suffix}", form)
        assert digest(path) == Digest(hashlib.sha256(path.read_bytes()).hexdigest(), (), lines(form))


def test_the_sha256_of_a_pair_is_over_both_and_each_has_its_own(tmp_path):
    a, b = (
        write(tmp_path / f"{name}.safetensors", {f"{name}.1.weight": torch.ones(3)}) for name in ("encoder", "decoder")
    )
    both = digest(a, b)
    assert both.sha256 == hashlib.sha256(a.read_bytes() + b.read_bytes()).hexdigest()
    assert both.halves == tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, b))


IO = Path("/proc/self/io")


@pytest.mark.skipif(not IO.exists(), reason="counts what the system says that was read")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_new_file_s_bytes_are_read_once(tmp_path, suffix):
    state = {f"encoder.{index}.weight": torch.randn(1 << 20) for index in range(4)}
    path = write(tmp_path / f"x{suffix}", under("first_stage_model.")(state) | {"model.x": torch.randn(1 << 20)})

    def read() -> int:
        return int(IO.read_text().split()[1])  # rchar

    digest(path)  # what torch itself reads at first
    begun = read()
    digest(path)
    assert path.stat().st_size <= read() - begun < 1.02 * path.stat().st_size


def test_reading_ends_when_it_is_told_to(tmp_path):
    file = open_weights(write(tmp_path / "x.safetensors", state_of()))

    def check() -> None:
        raise Unavailable("stop")

    with pytest.raises(Unavailable):
        digest_of([file], check)


# -- kept -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "VAE" / "a.safetensors", state_of("taesd"))
    write(tmp_path / "VAE" / "b.pt", state_of("taesd", seed=1))
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """What was read whole, in order."""
    names: list[str] = []

    def count(files, check):
        names.append(files[0].path.name)
        return digest_of(files, check)

    monkeypatch.setattr(store_module, "digest_of", count)
    return names


def scanned(folder: Path) -> dict[str, str]:
    store = ModelStore([folder], "sd1")
    store.scan()
    return {entry.name: entry.sha256 for entry in store.entries() if isinstance(entry, Checkpoint)}


def test_a_second_start_reads_no_file_again(folder, reads):
    first = scanned(folder)
    assert sorted(reads) == ["a.safetensors", "b.pt"]
    assert scanned(folder) == first
    assert len(reads) == 2


def test_a_changed_time_or_size_is_read_again(folder, reads):
    first = scanned(folder)
    reads.clear()
    os.utime(folder / "VAE" / "a.safetensors", ns=(1, 1))
    assert scanned(folder) == first
    write(folder / "VAE" / "b.pt", state_of("taesd", seed=2))
    assert scanned(folder)["b"] != first["b"]
    assert reads == ["a.safetensors", "b.pt"]


def test_a_renamed_file_is_not_read_again(folder, reads):
    store = ModelStore([folder], "sd1")
    store.scan()
    (folder / "VAE" / "a.safetensors").rename(folder / "VAE" / "c.safetensors")
    reads.clear()
    store.scan()
    assert [entry.name for entry in store.entries()] == ["b", "c"]
    assert scanned(folder).keys() == {"b", "c"}
    assert reads == []


def test_another_file_of_the_same_size_and_time_is_read_while_the_service_runs(folder, reads):
    path = folder / "VAE" / "a.safetensors"
    store = ModelStore([folder], "sd1")
    store.scan()
    before, status = store.resolve("a").sha256, path.stat()
    new = write(folder / "new.safetensors", state_of("taesd", seed=3))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(path)
    store.scan()
    assert store.resolve("a").sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != before
    assert scanned(folder)["a"] == store.resolve("a").sha256


ROW = {"files": [["VAE/a.safetensors", 1, 1]], "sha256": "a" * 64, "halves": [], "tensors": "b" * 64}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        "[" * 100_000,
        '{"version": 2, "rows": []}',
        '{"version": 1}',
        '{"version": 1, "rows": 3}',
        '{"version": 1, "rows": [3]}',
        json.dumps({"version": 1, "rows": [ROW | {"files": []}]}),
        json.dumps({"version": 1, "rows": [ROW | {"files": [["x", "1", 2]]}]}),
        json.dumps({"version": 1, "rows": [ROW | {"sha256": "b"}]}),
        json.dumps({"version": 1, "rows": [ROW | {"halves": [1]}]}),
        json.dumps({"version": 1, "rows": [ROW | {"tensors": None}]}),
        json.dumps({"version": 1, "rows": [{}]}),
    ],
)
def test_garbage_in_the_cache_is_written_over(folder, reads, text):
    (folder / CACHE).write_text(text, encoding="latin-1")
    first = scanned(folder)
    assert len(first) == len(reads) == 2
    assert scanned(folder) == first
    assert len(reads) == 2


def test_a_folder_that_cannot_be_written_to_serves_all_the_same(folder, reads, monkeypatch):
    def refuse(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert len(scanned(folder)) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["VAE"]


def test_no_partial_file_is_left(folder, monkeypatch):
    def refuse(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert len(scanned(folder)) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["VAE"]


def test_two_processes_keep_each_other_s_rows(folder):
    files = [folder / "VAE" / name for name in ("a.safetensors", "b.pt")]
    one, two = DigestCache(folder), DigestCache(folder)
    for cache, path in zip((one, two), files, strict=True):
        cache.get((stamp(path),))
        cache.put((stamp(path),), SOME)
    one.save()
    two.save()
    third = DigestCache(folder)
    assert [third.get((stamp(path),)) for path in files] == [SOME, SOME]


def test_the_number_of_rows_is_bounded_and_the_latest_stay(folder, monkeypatch):
    monkeypatch.setattr("app.store.digests.ROWS", 3)
    cache = DigestCache(folder)
    paths = []
    for number in range(6):
        paths.append(folder / f"{number}.pt")
        paths[-1].write_bytes(bytes(number))
        cache.put((stamp(paths[-1]),), SOME)
    cache.save()
    fresh = DigestCache(folder)
    assert [fresh.get((stamp(path),)) is not None for path in paths] == [False] * 3 + [True] * 3


def test_a_name_that_is_not_utf_8_is_kept(folder, reads):
    shutil.copy(folder / "VAE" / "b.pt", folder / "VAE" / os.fsdecode(b"caf\xe9.pt"))
    first = scanned(folder)
    reads.clear()
    assert scanned(folder) == first
    assert reads == []


def test_many_threads_write_one_file(folder):
    cache = DigestCache(folder)
    for number in range(40):
        (folder / f"{number}.pt").write_bytes(bytes(number))

    def work(number: int) -> None:
        cache.put((stamp(folder / f"{number}.pt"),), SOME)
        cache.save()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = DigestCache(folder)
    assert all(fresh.get((stamp(folder / f"{number}.pt"),)) == SOME for number in range(40))
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [CACHE]


def test_services_of_one_process_number_write_no_file_together(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in containers
    monkeypatch.setattr(Path, "write_text", lambda path, _: written.append(path.name))
    path = tmp_path / "a"
    path.touch()
    for _ in range(2):
        cache = DigestCache(tmp_path)
        cache.put((stamp(path),), SOME)
        cache.save()
    assert len(set(written)) == len(written) == 2


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(folder, reads):
    os.mkfifo(folder / CACHE)
    assert len(scanned(folder)) == len(reads) == 2
    assert (folder / CACHE).is_file()  # another has taken its place
