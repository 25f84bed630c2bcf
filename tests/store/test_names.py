"""What models are called."""

import os

from app.store.names import names_of
from tests.store.test_folder import found, put


def test_names_are_unique_whatever_collides(tmp_path):
    put(tmp_path, "VAE/s/a.pt", "VAE/s/a.ckpt", "checkpoints/s/a.pt", "checkpoints/s/a.ckpt")
    put(tmp_path, "VAE/s/b_encoder.pt", "VAE/s/b_decoder.pt", "VAE/s/b.pt")
    sources = found(tmp_path)
    assert len(set(names_of(sources).values())) == len(sources) == 6


def test_a_file_s_name_and_another_s_stem_are_told_apart(tmp_path):
    put(tmp_path, "VAE/a.pt", "VAE/a.ckpt", "VAE/a.pt.pt")
    assert set(names_of(found(tmp_path)).values()) == {"VAE/a.pt", "a.ckpt", "a.pt"}


def test_a_name_that_is_not_utf_8_is_shown_with_escapes(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.safetensors")).write_bytes(b"")
    (name,) = names_of(found(tmp_path)).values()
    assert name == "caf\\xe9"
    assert name.encode() == b"caf\\xe9"
