"""Which files make which models, and what they are called."""

import os
from pathlib import Path

import pytest

from app.store.folder import Source, read_json, source_of, sources
from app.store.names import names_of
from app.store.tree import walk

KL = '{"_class_name": "AutoencoderKL"}'


def put(folder: Path, *names: str, text: str = "") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def found(folder: Path) -> list[Source]:
    return sources(walk([folder], {}).values(), [folder])


def names(folder: Path) -> dict[str, tuple[str, ...]]:
    """{model's name: its weights, relative to the folder}."""
    return {
        name: tuple(file.relative_to(folder).as_posix() for file in source.files)
        for source, name in names_of(found(folder)).items()
    }


def test_the_webui_s_and_comfyui_s_folders(tmp_path):
    put(
        tmp_path,
        "VAE/a.pt",
        "vae/b.bin",
        "vae_approx/c.pth",
        "Stable-diffusion/sub/d.ckpt",
        "checkpoints/e.safetensors",
    )
    put(tmp_path, "Lora/f.safetensors", "g.safetensors")
    assert names(tmp_path).keys() == {"a", "b", "c", "d", "e"}


def test_without_such_folders_the_folder_itself(tmp_path):
    put(tmp_path, "g.safetensors", "sub/h.pt")
    assert names(tmp_path).keys() == {"g", "h"}


def test_hidden_files_partial_downloads_and_others_are_ignored(tmp_path):
    put(tmp_path, ".a.safetensors", ".cache/b.safetensors", "c.safetensors.part", "d.ckpt.tmp", "e.pt.crdownload")
    put(tmp_path, "f.txt", "g.png", "README.md", "h.sft")
    assert names(tmp_path) == {"h": ("h.sft",)}


def test_suffixes_in_capitals(tmp_path):
    put(tmp_path, "A.SAFETENSORS")
    assert names(tmp_path) == {"A": ("A.SAFETENSORS",)}


def test_colliding_names(tmp_path):
    put(tmp_path, "VAE/x.safetensors", "checkpoints/x.safetensors", "VAE/sub/y.pt", "VAE/y.pt")
    put(tmp_path, "VAE/z.ckpt", "VAE/z.safetensors", "VAE/only.pt")
    assert names(tmp_path).keys() == {
        "VAE/x",
        "checkpoints/x",
        "sub/y",
        "VAE/y",
        "z.ckpt",
        "z.safetensors",
        "only",
    }


def test_pairs(tmp_path):
    put(tmp_path, "taesd_encoder.pth", "taesd_decoder.pth", "half_encoder.pth", "mixed_encoder.pth")
    put(tmp_path, "mixed_decoder.safetensors", "full_encoder_small_decoder.safetensors")
    assert names(tmp_path) == {
        "taesd": ("taesd_encoder.pth", "taesd_decoder.pth"),
        "mixed": ("mixed_encoder.pth", "mixed_decoder.safetensors"),
        "half_encoder": ("half_encoder.pth",),
        "full_encoder_small_decoder": ("full_encoder_small_decoder.safetensors",),
    }


def test_a_pair_in_two_suffixes_is_two_models(tmp_path):
    put(tmp_path, "t_encoder.pth", "t_decoder.pth", "t_encoder.safetensors", "t_decoder.safetensors")
    assert names(tmp_path).keys() == {"t.pth", "t.safetensors"}


def test_diffusers_folders(tmp_path):
    put(tmp_path, "VAE/mse/config.json", "VAE/own/config.json", text=KL)
    put(tmp_path, "VAE/mse/diffusion_pytorch_model.safetensors", "VAE/mse/diffusion_pytorch_model.bin")
    put(tmp_path, "VAE/mse/sdxl_vae.safetensors", "VAE/own/weights.safetensors")
    assert names(tmp_path) == {
        "mse": ("VAE/mse/diffusion_pytorch_model.safetensors",),
        "sdxl_vae": ("VAE/mse/sdxl_vae.safetensors",),
        "own": ("VAE/own/weights.safetensors",),
    }


def test_a_pipeline_s_vae_has_the_pipeline_s_name(tmp_path):
    put(tmp_path, "checkpoints/sd/vae/config.json", text=KL)
    put(tmp_path, "checkpoints/sd/vae/diffusion_pytorch_model.fp16.safetensors", "checkpoints/sd/model_index.json")
    put(tmp_path, "checkpoints/sd/unet/config.json", "checkpoints/sd/unet/diffusion_pytorch_model.safetensors")
    put(tmp_path, "checkpoints/sd/sd_xl_base.safetensors")
    assert names(tmp_path) == {
        "sd": ("checkpoints/sd/vae/diffusion_pytorch_model.fp16.safetensors",),
        "sd_xl_base": ("checkpoints/sd/sd_xl_base.safetensors",),
    }


def test_a_config_without_weights_is_a_model_with_a_fault(tmp_path):
    put(tmp_path, "x/config.json", text=KL)
    put(tmp_path, "y/config.json", text='{"_class_name": "UNet2DConditionModel"}')
    put(tmp_path, "z/config.json", text="{")
    assert names(tmp_path) == {"x": ()}


def test_shards_are_one_model_with_a_fault(tmp_path):
    put(tmp_path, "x/config.json", text=KL)
    put(tmp_path, *(f"x/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)))
    assert names(tmp_path) == {"x": ()}


def test_sidecars(tmp_path):
    put(tmp_path, "a.safetensors", "a.json", "t_encoder.pt", "t_decoder.pt", "t.json", "b.pt", "m.json")
    put(tmp_path, "m/config.json", text=KL)
    put(tmp_path, "m/diffusion_pytorch_model.bin")
    sidecars = {source.stem: source.sidecar for source in found(tmp_path)}
    assert sidecars == {"a": tmp_path / "a.json", "t": tmp_path / "t.json", "b": None, "m": tmp_path / "m.json"}


def test_links_may_leave_the_folder(tmp_path):
    put(tmp_path, "elsewhere/a.pt", "elsewhere/deep/b.pt")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "VAE").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "models" / "dead.pt").symlink_to(tmp_path / "nowhere.pt")
    assert names(tmp_path / "models").keys() == {"a", "b"}


def test_links_in_a_circle_end(tmp_path):
    put(tmp_path, "VAE/a.pt")
    (tmp_path / "VAE" / "again").symlink_to(tmp_path / "VAE")
    (tmp_path / "VAE" / "up").symlink_to(tmp_path)
    assert names(tmp_path).keys() == {"a"}


def test_source_of_a_file_its_pair_and_folders(tmp_path):
    put(tmp_path, "a.weights", "t_encoder.pt", "t_decoder.pt", "sd/vae/diffusion_pytorch_model.bin")
    put(tmp_path, "sd/vae/config.json", text=KL)
    assert source_of(tmp_path / "a.weights").files == (tmp_path / "a.weights",)
    assert source_of(tmp_path / "t_decoder.pt").files == (tmp_path / "t_encoder.pt", tmp_path / "t_decoder.pt")
    for folder in ("sd", "sd/vae"):
        source = source_of(tmp_path / folder)
        assert source.files == (tmp_path / "sd/vae/diffusion_pytorch_model.bin",)
        assert source.stem == "sd"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        source_of(tmp_path / "nothing.pt")


def test_the_folders_names_in_any_case_and_one_folder_by_two_names(tmp_path):
    put(tmp_path, "Vae/a.pt", "stable-diffusion/b.ckpt", "VAE-Approx/c.pt", "CHECKPOINTS/d.pt")
    (tmp_path / "vae").symlink_to(tmp_path / "Vae")  # as a system that ignores case would have it
    assert names(tmp_path).keys() == {"a", "b", "c", "d"}


def test_a_whole_webui_tree(tmp_path):
    put(
        tmp_path,
        "Stable-diffusion/foo.safetensors",
        "Stable-diffusion/foo.vae.safetensors",
        "Stable-diffusion/foo.yaml",
    )
    put(tmp_path, "Stable-diffusion/bar.ckpt", "Stable-diffusion/sub/bar.vae.pt", "VAE-approx/model.pt")
    put(tmp_path, "Stable-diffusion/baz.ckpt", "Stable-diffusion/baz.vae.pt", "VAE/foo.safetensors")
    put(tmp_path, "Lora/l.safetensors", "ESRGAN/e.pth", "hypernetworks/h.pt", "diffusion_models/u.safetensors")
    assert names(tmp_path).keys() == {
        *("Stable-diffusion/foo", "foo.vae", "bar", "bar.vae", "baz", "baz.vae", "VAE/foo", "model"),
    }
    owners = {source.stem: source.owner for source in found(tmp_path) if source.owner}
    place = tmp_path / "Stable-diffusion"
    assert owners == {"foo.vae": place / "foo.safetensors", "baz.vae": place / "baz.ckpt"}


def test_what_opens_only_with_another_s_help_is_no_model(tmp_path):
    put(tmp_path, "a.pt")
    for name in ("pipe.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "link.ckpt").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    assert names(tmp_path) == {"a": ("a.pt",)}
    with pytest.raises(OSError, match="no regular file"):
        source_of(tmp_path / "pipe.safetensors")


def test_one_root_that_may_not_be_asked_for_hides_no_other(tmp_path):
    put(tmp_path, "VAE/a.pt")
    (tmp_path / "checkpoints").symlink_to("x" * 300)  # too long a name: pathlib raises, as for what is forbidden
    assert names(tmp_path).keys() == {"a"}


def test_folders_in_folders_without_end(tmp_path):
    put(tmp_path, "a.pt", "/".join("d" * 60) + "/b.pt", "/".join("e" * 200) + "/c.pt")
    assert names(tmp_path).keys() == {"a", "b"}


def test_the_webui_s_folder_of_tiny_autoencoders(tmp_path):
    put(tmp_path, "VAE/a.pt", "VAE-taesd/taesd_encoder.pth", "VAE-taesd/taesd_decoder.pth")
    assert names(tmp_path).keys() == {"a", "taesd"}


def test_a_file_that_aria2_is_filling_waits(tmp_path):
    put(tmp_path, "a.safetensors", "b.safetensors", "b.safetensors.aria2")
    assert names(tmp_path).keys() == {"a"}


def test_a_pipe_that_comes_between_the_look_and_the_reading_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(OSError, match="no regular file"):
        read_json(tmp_path / "a.json")
