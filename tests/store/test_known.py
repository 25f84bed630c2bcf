"""The known table is sound, and pairs are known by their halves."""

import re

from app.store.known import known_files, lookup
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
