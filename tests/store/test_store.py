"""The models folder as callers see it: what is listed, what a name means, and what changes without a restart."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.errors import InvalidParameter, UnknownModel, UnsupportedCheckpoint
from app.store import store as store_module
from app.store.checkpoint import Checkpoint, load_autoencoder
from app.store.digests import CACHE, Digest, digest_of
from app.store.known import Known
from app.store.names import Unreadable
from app.store.store import Look, ModelStore
from app.weights import files as files_module
from app.weights.files import WeightFile
from tests.store.weights import as_diffusers, state_of, under, write, write_folder


@pytest.fixture
def store(tmp_path):
    (tmp_path / "VAE").mkdir()
    return ModelStore([tmp_path], "sd1")


def put(store: ModelStore, name: str, seed: int = 0, family: str = "taesd") -> Path:
    return write(store.folders[0] / name, state_of(family, seed))


def listed(store: ModelStore) -> dict[str, str]:
    """{name: family, or what is wrong}."""
    return {
        entry.name: entry.family.name if isinstance(entry, Checkpoint) else entry.error for entry in store.entries()
    }


def test_an_empty_folder(store):
    assert store.entries() == []
    store.scan()
    assert store.entries() == []
    with pytest.raises(UnknownModel, match="no usable model"):
        store.resolve(None)


def test_a_folder_that_is_not_there(tmp_path):
    store = ModelStore([tmp_path / "nothing"], "sd1")
    store.scan()
    assert store.entries() == []


def test_good_and_bad_files_are_listed(store):
    put(store, "VAE/good.safetensors")
    put(store, "VAE/b.pt", family="sd1")
    (store.folders[0] / "VAE/empty.ckpt").touch()
    (store.folders[0] / "VAE/text.safetensors").write_text("hello, this is text")
    write(store.folders[0] / "VAE/unet.safetensors", {"model.diffusion_model.out.2.weight": torch.zeros(3)})
    write(store.folders[0] / "VAE/lone_encoder.pth", {"0.weight": torch.zeros(3)})
    put(store, "VAE/odd.pt")
    (store.folders[0] / "VAE/odd.json").write_text('{"family": "sd9"}')
    store.scan()
    entries = listed(store)
    assert list(entries) == sorted(entries)
    assert entries["good"] == "taesd"
    assert entries["b"] == "sd1"
    assert "not a checkpoint" in entries["empty"]
    assert "not a safetensors file" in entries["text"]
    assert "no VAE inside" in entries["unet"]
    assert entries["lone_encoder"] == "only the encoder: lone_decoder.* is missing beside it"
    assert "unknown family 'sd9'" in entries["odd"]


def test_a_reason_is_one_line(store):
    write(store.folders[0] / "VAE/x.pt", state_of("sd1") | {"a\nb" * 1000: torch.zeros(1)})
    store.scan()
    entry = store.entries()[0]
    assert isinstance(entry, Unreadable)
    assert "\n" not in entry.error
    assert len(entry.error) <= 500


def test_by_name_by_hash_and_alone(store):
    path = put(store, "VAE/a.safetensors")
    store.scan()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for model in (None, "a", sha256, sha256[:8], sha256[:20].upper()):
        assert store.resolve(model).sha256 == sha256
    for model in ("A", "a.safetensors", sha256[:7], "0" * 64, ""):
        with pytest.raises(UnknownModel, match="there are: a"):
            store.resolve(model)


def test_a_demonstration_steps_back_where_others_are(store):
    demo = write(store.folders[0] / "VAE/demo.safetensors", state_of(), {"family": "latentd-small"})
    store.scan()
    assert store.resolve(None).name == "demo"
    (store.folders[0] / "VAE/broken.pt").write_text("no")
    store.scan()
    assert store.resolve(None).name == "demo"  # what cannot be used is no other
    put(store, "VAE/mine.safetensors")
    store.scan()
    assert store.resolve(None).name == "mine"
    assert store.resolve("demo").path == demo
    assert store.resolve(None, "demo").path == demo
    put(store, "VAE/other.safetensors", seed=1)
    store.scan()
    with pytest.raises(InvalidParameter, match=r"there are several: demo, mine, other$"):
        store.resolve(None)
    for name in ("mine", "other"):
        (store.folders[0] / f"VAE/{name}.safetensors").unlink()
    store.scan()
    assert store.resolve(None).name == "demo"


def test_several_models(store):
    put(store, "VAE/a.safetensors")
    put(store, "VAE/b.safetensors", seed=1)
    (store.folders[0] / "VAE/broken.pt").touch()
    store.scan()
    with pytest.raises(InvalidParameter, match=r"model is required, as there are several: a, b$"):
        store.resolve(None)
    assert store.resolve(None, "b").name == "b"
    assert store.resolve("a", "b").name == "a"
    with pytest.raises(UnknownModel, match="'c'; there are: a, b, broken"):
        store.resolve(None, "c")
    with pytest.raises(UnsupportedCheckpoint, match="model broken: not a checkpoint"):
        store.resolve("broken")


def test_a_broken_file_does_not_make_the_only_model_ambiguous(store):
    put(store, "VAE/a.safetensors")
    (store.folders[0] / "VAE/broken.pt").touch()
    store.scan()
    assert store.resolve(None).name == "a"


def test_the_names_in_an_error_are_capped(store):
    for index in range(25):
        (store.folders[0] / f"VAE/{index:02}.pt").touch()
    store.scan()
    with pytest.raises(UnknownModel, match=r"19 and 5 more$"):
        store.resolve("nothing")


def test_a_prefix_of_two_models_is_ambiguous_but_not_of_two_copies(store, monkeypatch):
    monkeypatch.setattr("app.store.names.PREFIX", 0)
    put(store, "VAE/a.pt")
    shutil.copy(store.folders[0] / "VAE/a.pt", store.folders[0] / "VAE/copy.pt")
    store.scan()
    assert store.resolve("").name == "a"
    put(store, "VAE/b.pt", seed=1)
    store.scan()
    with pytest.raises(InvalidParameter, match="sha256 of several models"):
        store.resolve("")


def test_pairs_and_folders(store):
    state = state_of("taesd")
    total = hashlib.sha256()
    for half in ("encoder", "decoder"):
        bare = {key.removeprefix(f"{half}."): value for key, value in state.items() if key.startswith(half)}
        total.update(write(store.folders[0] / f"VAE/tiny_{half}.pth", bare).read_bytes())
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}
    folder = write_folder(store.folders[0] / "VAE/xl", state_of("sdxl"), config)
    store.scan()
    assert listed(store) == {"tiny": "taesd", "xl": "sdxl"}
    assert store.resolve("tiny").sha256 == total.hexdigest()
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert store.resolve("xl").sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_files_added_replaced_and_removed(store):
    path = put(store, "VAE/a.safetensors")
    store.scan()
    before = store.resolve("a")

    put(store, "VAE/b.pt", seed=1)
    store.scan()
    assert listed(store).keys() == {"a", "b"}

    new = put(store, "new/a.safetensors", seed=2)
    new.replace(path)
    store.scan()
    assert store.resolve("a").sha256 != before.sha256

    path.unlink()
    store.scan()
    assert listed(store).keys() == {"b"}


def test_a_replacement_of_the_same_size_and_time_is_noticed(store):
    path = put(store, "VAE/a.safetensors")
    status = path.stat()
    store.scan()
    new = put(store, "new/a.safetensors", seed=2)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert new.stat().st_size == status.st_size
    new.replace(path)


def test_a_sidecar_takes_effect_and_lets_go(store):
    put(store, "VAE/a.safetensors", family="sd1")
    store.scan()
    assert listed(store) == {"a": "sd1"}
    (store.folders[0] / "VAE/a.json").write_text('{"family": "sdxl"}')
    store.scan()
    assert store.resolve("a").family_source == "operator"
    (store.folders[0] / "VAE/a.json").unlink()
    store.scan()
    assert listed(store) == {"a": "sd1"}


def test_a_file_being_copied_in_heals(store):
    whole = put(store, "outside.safetensors").read_bytes()
    path = store.folders[0] / "VAE/a.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    store.scan()
    assert "truncated" in listed(store)["a"]
    with path.open("ab") as file:
        file.write(whole[len(whole) // 2 :])
    store.scan()
    assert listed(store) == {"a": "taesd"}


def test_only_new_files_are_read_again(store, monkeypatch):
    put(store, "VAE/a.safetensors")
    store.scan()
    path = put(store, "VAE/b.safetensors", seed=1)
    read: list[Path] = []

    def count(files: tuple[WeightFile, ...], check: Callable[[], None]) -> Digest:
        read.extend(file.path for file in files)
        return digest_of(files, check)

    monkeypatch.setattr("app.store.store.digest_of", count)
    store.scan()
    assert read == [path]
    assert store.resolve("b").sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_collision_renames_both_and_one_gone_renames_back(store):
    put(store, "VAE/a.safetensors")
    store.scan()
    put(store, "checkpoints/a.safetensors", seed=1)
    store.scan()
    assert listed(store).keys() == {"VAE/a", "checkpoints/a"}
    assert store.resolve("VAE/a").name == "VAE/a"
    (store.folders[0] / "checkpoints/a.safetensors").unlink()
    store.scan()
    assert listed(store).keys() == {"a"}


def test_a_reader_keeps_its_checkpoint_while_the_folder_changes(store):
    path = put(store, "VAE/a.safetensors")
    store.scan()
    checkpoint = store.resolve("a")
    module = load_autoencoder(checkpoint, torch.float32, torch.device("cpu"))
    path.unlink()
    store.scan()
    assert module.state_dict().keys() == state_of("taesd").keys()
    assert store.entries() == []


def test_linked_models(store, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "blob", as_diffusers(state_of("taesd")))
    (elsewhere / "blob").rename(elsewhere / "data.safetensors.blob")
    write(elsewhere / "a.safetensors", state_of("taesd"))
    (store.folders[0] / "VAE/linked.safetensors").symlink_to(elsewhere / "a.safetensors")
    store.scan()
    assert listed(store) == {"linked": "taesd"}
    write(elsewhere / "a.safetensors", state_of("taesd", seed=3))


def test_16_channels_need_a_word(store):
    put(store, "VAE/ae.safetensors", family="flux")
    store.scan()
    assert "could be sd3 or flux" in listed(store)["ae"]
    (store.folders[0] / "VAE/ae.json").write_text('{"family": "flux"}')
    store.scan()
    assert listed(store) == {"ae": "flux"}


# -- copies -----------------------------------------------------------------------------------------------------------


def copies(store: ModelStore) -> dict[str, str | None]:
    return {entry.name: entry.copy_of for entry in store.entries() if isinstance(entry, Checkpoint)}


def halved(store: ModelStore, name: str, family: str = "sd1") -> Path:
    return write(store.folders[0] / name, {key: value.half() for key, value in state_of(family).items()})


@pytest.fixture
def famous(store, monkeypatch):
    """A known file, outside of the folder."""
    path = put(store, "outside.safetensors", family="sd1")
    row = Known("a famous one", hashlib.sha256(path.read_bytes()).hexdigest(), "sdxl", "overflows")
    monkeypatch.setattr("app.store.known.known_files", lambda: {row.sha256: row})
    return path


def test_copies_name_the_shortest_path(store):
    put(store, "VAE/long-name.safetensors", family="sd1")
    put(store, "VAE/b.ckpt", family="sd1")
    put(store, "VAE/other.pt", seed=1, family="sd1")
    baked = under("first_stage_model.")(state_of()) | {"model.diffusion_model.out.2.weight": torch.zeros(3)}
    write(store.folders[0] / "checkpoints/full.safetensors", baked)
    halved(store, "VAE/a-half.pt")
    store.scan()
    assert copies(store) == {"a-half": "b", "b": None, "full": "b", "long-name": "b", "other": None}
    (store.folders[0] / "VAE/b.ckpt").unlink()
    store.scan()
    assert copies(store) == {"a-half": None, "full": "a-half", "long-name": "a-half", "other": None}


@pytest.mark.parametrize("names", [("VAE/z-known", "VAE/a"), ("VAE/a-known", "VAE/z")])
def test_a_converted_copy_is_known_by_its_tensors_whichever_is_read_first(store, famous, names):
    known, copy = names
    halved(store, f"{copy}.pt")
    shutil.copy(famous, store.folders[0] / f"{known}.safetensors")
    store.scan()
    rows = {entry.name: entry for entry in store.entries() if isinstance(entry, Checkpoint)}
    original, twin = (rows[Path(name).name] for name in names)
    assert twin.sha256 != original.sha256
    assert twin.tensors_sha256 == original.tensors_sha256
    for row in (original, twin):
        assert (row.known_as, row.fp16) == ("a famous one", "overflows")
        assert (row.family.name, row.family_source) == ("sdxl", "hash")
    assert (original.copy_of, twin.copy_of) == (None, original.name)


def test_a_known_file_that_was_here_once_is_remembered(store, famous):
    shutil.copy(famous, store.folders[0] / "VAE/known.safetensors")
    store.scan()
    (store.folders[0] / "VAE/known.safetensors").unlink()
    again = ModelStore([store.folders[0]], "sd1")
    halved(store, "VAE/half.pt")
    again.scan()
    assert again.resolve("half").known_as == "a famous one"
    assert again.resolve("half").copy_of is None


def test_a_copy_of_a_known_file_that_nothing_else_identifies_becomes_usable(store, monkeypatch):
    path = put(store, "outside.safetensors", family="flux")
    row = Known("ae", hashlib.sha256(path.read_bytes()).hexdigest(), "flux", "ok")
    monkeypatch.setattr("app.store.known.known_files", lambda: {row.sha256: row})
    halved(store, "VAE/a.safetensors", family="flux")
    store.scan()
    assert "could be sd3 or flux" in listed(store)["a"]
    shutil.copy(path, store.folders[0] / "VAE/known.safetensors")
    store.scan()
    assert listed(store) == {"a": "flux", "known": "flux"}


def test_a_look_reads_no_weights_and_lists_nothing_new(store, monkeypatch):
    put(store, "VAE/a.pt")
    look = store.look(patient=False)
    assert [source.stem for source in look.unread] == ["a"]
    assert store.entries() == []
    assert store.identify(next(iter(look.unread)))
    assert listed(store) == {"a": "taesd"}
    assert not store.look().unread


def test_a_file_that_changes_while_it_is_hashed_is_not_listed(store, monkeypatch):
    path = put(store, "VAE/a.pt")

    def change(files: tuple[WeightFile, ...], check: Callable[[], None]) -> Digest:
        digest = digest_of(files, check)
        put(store, "VAE/a.pt", seed=4)
        return digest

    monkeypatch.setattr("app.store.store.digest_of", change)
    (source,) = store.look(patient=False).unread
    assert not store.identify(source)
    assert store.entries() == []
    monkeypatch.undo()
    store.scan()
    assert store.resolve("a").sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_goes_while_it_is_hashed_is_not_listed(store, monkeypatch):
    path = put(store, "VAE/a.pt")
    (source,) = store.look(patient=False).unread
    path.unlink()
    store.look()
    assert not store.identify(source)
    assert store.entries() == []


def test_the_least_bytes_are_read_first(store):
    put(store, "VAE/z.pt")
    put(store, "VAE/a.pt", family="sd1")
    assert [source.stem for source in store.look(patient=False).unread] == ["z", "a"]


def test_what_the_webui_and_others_leave_in_the_folders_is_an_error_in_one_line(store):
    write(
        store.folders[0] / "VAE-approx/model.pt",
        {"conv1.weight": torch.zeros(8, 4, 7, 7), "conv1.bias": torch.zeros(8)},
    )
    write(store.folders[0] / "checkpoints/unet.safetensors", {"model.diffusion_model.out.2.weight": torch.zeros(3)})
    write(store.folders[0] / "checkpoints/lora.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(3)})
    store.scan()
    assert all(reason.startswith("no VAE inside") for reason in listed(store).values())
    assert len(listed(store)) == 3


def test_a_reason_has_no_halves_of_surrogates(store, monkeypatch):
    def fail(*_):
        raise UnsupportedCheckpoint("half \ud800 a pair")

    monkeypatch.setattr(store_module, "identify_source", fail)
    put(store, "VAE/x.pt")
    store.scan()
    assert listed(store) == {"x": "half \\ud800 a pair"}


def test_what_follows_at_once_may_be_listed_together_and_the_last_lists_all(store, monkeypatch):
    monkeypatch.setattr(store_module, "LISTING", 1e9)
    for index in range(4):
        put(store, f"VAE/{index}.pt", seed=index)
    first, *others, last = store.look(patient=False).unread
    assert store.identify(first, patient=False, more=True)  # nothing was listed before: no reason to wait
    written = (store.folders[0] / CACHE).stat().st_mtime_ns
    for source in others:
        assert store.identify(source, patient=False, more=True)
    assert len(store.entries()) == 1
    assert (store.folders[0] / CACHE).stat().st_mtime_ns == written
    assert store.identify(last, patient=False)
    assert len(store.entries()) == 4
    assert len(json.loads((store.folders[0] / CACHE).read_text())["rows"]) == 4


def test_what_was_not_listed_yet_is_by_the_next_look(store, monkeypatch):
    monkeypatch.setattr(store_module, "LISTING", 1e9)
    for index in range(2):
        put(store, f"VAE/{index}.pt", seed=index)
    for source in store.look(patient=False).unread:
        store.identify(source, patient=False, more=True)
    assert len(store.entries()) == 1
    assert store.look() == Look({}, settling=False)
    assert len(store.entries()) == 2


def test_a_config_that_says_something_else_makes_other_models_of_the_same_names(store):
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}
    folder = write_folder(store.folders[0] / "VAE/xl", state_of("sdxl"), config)
    store.scan()
    assert listed(store) == {"xl": "sdxl"}
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    store.scan()
    assert listed(store).keys() == {"diffusion_pytorch_model"}


@pytest.mark.parametrize(("suffix", "reader"), [(".safetensors", "read_safetensors"), (".pt", "read_archive")])
def test_a_header_is_read_once_to_identify_and_once_to_load(store, monkeypatch, suffix, reader):
    read, real = Counter[str](), getattr(files_module, reader)

    def count(*arguments):
        read[reader] += 1
        return real(*arguments)

    monkeypatch.setattr(files_module, reader, count)
    put(store, f"VAE/a{suffix}")
    store.scan()
    assert read[reader] == 1
    load_autoencoder(store.resolve(None), torch.float32, torch.device("cpu"))
    assert read[reader] == 2


def test_several_folders_are_one_list(tmp_path):
    (tmp_path / "webui" / "VAE").mkdir(parents=True)
    a, b = tmp_path / "webui", tmp_path / "comfy"
    write(a / "VAE" / "x.safetensors", state_of("taesd"))
    write(b / "vae" / "x.safetensors", state_of("taesd", 1))
    write(b / "vae" / "y.safetensors", state_of("taesd"))
    write_folder(b / "vae" / "pipe" / "vae", state_of(), {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025})
    (a / "VAE" / "linked").symlink_to(b / "vae")
    store = ModelStore([a, b, a], "sd1")
    store.scan()
    assert listed(store) == {"VAE/x": "taesd", "linked/x": "taesd", "y": "taesd", "pipe": "sdxl"}
    (copy,) = [entry for entry in store.entries() if entry.name == "y"]
    assert isinstance(copy, Checkpoint)
    assert copy.copy_of == "VAE/x"
    again = ModelStore([b, a], "sd1")
    again.scan()
    assert {entry.path.parent for entry in again.entries() if entry.name == "vae/x"} == {b / "vae"}


def test_each_folder_keeps_its_own_digests(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        write(folder / "VAE" / f"{seed}.safetensors", state_of("taesd", seed))
    ModelStore(folders, "sd1").scan()
    assert all((folder / ".latentd-hashes.json").is_file() for folder in folders)
    monkeypatch.setattr(store_module, "digest_of", None)  # it would be called for a file without one
    for seed, folder in enumerate(folders):
        store = ModelStore([folder], "sd1")
        store.scan()
        assert listed(store) == {str(seed): "taesd"}
