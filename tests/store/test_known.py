"""The known table is sound, and pairs are known by their halves."""

import re

import pytest

from app.errors import UnknownModel
from app.store import known
from app.store.known import Known, fetchable, known_files, lookup, named
from app.vae.families import FAMILIES

MSE = "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75"
ENCODER = "15bc6128f0ac51c673d3427216082ebfa62402ffc89763af74edfe259b32d49d"  # taesd_encoder.pth
DECODER = "02873377c3f4659cd9f9adb2f718dcb434ba4c7bba3af3ee7bb95cbdabe2d3cf"
OTHER_DECODER = "a3956b8a7a763f251c7357aad6375dacdb6d971121c73e97a3069fc33a94fe1e"  # taesdxl_decoder.pth


def test_every_row_is_sound():
    assert len(known_files()) > 50
    for sha256, row in known_files().items():
        assert re.fullmatch("[0-9a-f]{64}", sha256)
        assert row.sha256 == sha256
        assert row.family in FAMILIES
        assert row.fp16 in {"ok", "overflows", "unknown"}
        assert row.name.strip()


def test_no_two_rows_share_a_name():
    names = [row.name for row in known_files().values()]
    assert len(set(names)) == len(names)


def test_lookup():
    row = lookup(MSE)
    assert row is not None
    assert (row.name, row.family) == ("vae-ft-mse-840000-ema-pruned.safetensors", "sd1")
    assert lookup("0" * 64) is None


def test_sdxl_overflows_and_its_fix_does_not():
    by_name = {row.name: row for row in known_files().values()}
    assert by_name["sdxl_vae.safetensors (stabilityai/sdxl-vae)"].fp16 == "overflows"
    assert by_name["sdxl_vae.safetensors (madebyollin/sdxl-vae-fp16-fix)"].fp16 == "ok"


def test_a_pair_is_known_by_both_halves():
    row = lookup("0" * 64, (ENCODER, DECODER))
    assert row is not None
    assert row.family == "taesd"
    assert lookup("0" * 64, (ENCODER, OTHER_DECODER)) is None
    assert lookup("0" * 64, (ENCODER, "1" * 64)) is None


def test_what_can_be_fetched_has_a_place_and_a_name_of_its_own():
    saved: list[str] = []
    for first, rows in fetchable().items():
        assert re.fullmatch(r"[a-z0-9._-]+", first)
        assert len(rows) == (2 if first.endswith("-halves") else 1)
        for row in rows:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.repo or "")
            assert re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(safetensors|ckpt|pth)", row.file or "")
            assert row.bytes is None or 1_000_000 < row.bytes < 2_000_000_000
            assert row.names[0] == first
            assert re.fullmatch(r"\w[\w.-]*\.(safetensors|ckpt|pth)", row.save_as)
            saved.append(row.save_as)
    assert len(set(saved)) == len(saved)
    assert len(fetchable()) > 20


def test_rows_without_a_place_have_none_of_it():
    assert all((row.repo is None) == (row.file is None) for row in known_files().values())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vae-ft-mse-840000", "vae-ft-mse-840000-ema-pruned.safetensors"),
        ("vae-ft-mse-840000-ema-pruned", "vae-ft-mse-840000-ema-pruned.safetensors"),
        ("VAE-ft-MSE-840000-ema-pruned.safetensors", "vae-ft-mse-840000-ema-pruned.safetensors"),
        ("sd-vae-ft-mse", "sd-vae-ft-mse.safetensors"),
        ("kl-f8-anime2", "kl-f8-anime2.ckpt"),
        ("sdxl-vae", "sdxl-vae.safetensors"),
        ("sdxl-vae-fp16-fix", "sdxl-vae-fp16-fix.safetensors"),
        ("taesd", "taesd.safetensors"),
        ("taef2", "taef2.safetensors"),
    ],
)
def test_common_names(name, file):
    assert [row.save_as for row in named(name)] == [file]


@pytest.mark.parametrize("name", ["taesd-halves", "taesd_encoder", "taesd_decoder.safetensors"])
def test_a_half_never_comes_alone(name):
    assert sorted(row.save_as for row in named(name)) == ["taesd_decoder.safetensors", "taesd_encoder.safetensors"]
    assert {row.family for row in named(name)} == {"taesd"}


def test_a_name_that_two_files_share_is_not_guessed_at():
    with pytest.raises(UnknownModel, match="sdxl-vae and of sdxl-vae-fp16-fix"):
        named("sdxl_vae")


def test_a_file_that_is_known_but_nowhere_to_be_had(monkeypatch):
    rows = {
        "0": Known("x", "0", "sd1", names=("x",)),
        "1": Known("y", "1", "sd1", names=("y",), repo="a/b", file="y.pt"),
    }
    monkeypatch.setattr(known, "known_files", lambda: rows)
    with pytest.raises(UnknownModel, match=r"nothing known as 'x' can be fetched; there are: y$"):
        named("x")
