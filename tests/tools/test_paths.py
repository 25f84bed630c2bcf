import time
from pathlib import Path

import pytest

from app.errors import InvalidInput
from app.tools.paths import DECODE, ENCODE, find


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def targets(found) -> list[str]:
    return [item.target.relative_to(found.folder).as_posix() for item in found.items]


def test_folders_are_walked_and_keep_their_layout(tmp_path):
    folder = touched(tmp_path, "b.PNG", "a/c.jpg", "a/d.jpeg", "a/deep/e.webp", "a/notes.txt", "x.y.png")
    found = find([str(folder)], "out", ENCODE)
    assert targets(found) == ["a/c.npy", "a/d.npy", "a/deep/e.npy", "b.npy", "x.y.npy"]
    assert all(item.source and item.source.is_file() for item in found.items)
    assert [item.inside for item in found.items][:2] == ["a/c.jpg", "a/d.jpeg"]


def test_a_file_is_taken_whatever_it_is_called(tmp_path):
    found = find([str(tmp_path / ".x.y.bmp")], "out", ENCODE)
    assert (found.items[0].source, targets(found)) == (tmp_path / ".x.y.bmp", [".x.y.npy"])


def test_files_of_latents(tmp_path):
    folder = touched(tmp_path, "a.npy", "b.safetensors", "c.npz", "d.latent", "e.pt", "f.png", "g.ckpt")
    found = find([str(folder)], "out", DECODE)
    assert targets(found) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert found.passed_over == {".ckpt": 1}


def test_what_is_hidden_is_not_taken(tmp_path):
    folder = touched(tmp_path, "a.png", ".b.png", ".thumbnails/c.png", "d/.e/f.png", ".g.png.part", "._a.png")
    assert targets(find([str(folder)], "out", ENCODE)) == ["a.npy"]


def test_pictures_that_are_not_read_are_counted(tmp_path):
    folder = touched(tmp_path, "a.png", "b.bmp", "c.GIF", "d/e.gif", "f.tiff", "g.heic", ".h.gif", "i.txt")
    assert find([str(folder)], "out", ENCODE).passed_over == {".bmp": 1, ".gif": 2, ".tiff": 1, ".heic": 1}
    (folder / "a.png").unlink()
    with pytest.raises(InvalidInput, match=r"no files of \.avif, .*, \.webp in .*; not read: 1 \.bmp, 2"):
        find([str(folder)], "out", ENCODE)


def test_two_inputs_for_one_output_are_refused(tmp_path):
    folder = touched(tmp_path, "a.png", "a.jpg")
    for inputs in ([str(folder)], ["x/a.png", "y/a.png"]):
        with pytest.raises(InvalidInput, match=r"several inputs would be written to a\.npy"):
            find(inputs, "out", ENCODE)


def test_one_file_goes_to_one_file(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    for name in ("one.npy", "one.SAFETENSORS"):
        found = find(["a.png"], str(tmp_path / name), ENCODE)
        assert ([item.target for item in found.items], found.folder) == ([tmp_path / name], None)
    assert targets(find(["a.png"], str(tmp_path / "folder.npy"), ENCODE)) == ["a.npy"]
    assert targets(find(["a.png"], str(tmp_path / "one.png"), ENCODE)) == ["a.npy"]  # no suffix of a latent's
    assert find(["a.npy"], "x.jpg", DECODE).items[0].target == Path("x.jpg")


@pytest.mark.parametrize("output", ["one.npy", "-"])
def test_several_files_do_not_go_to_one(tmp_path, output):
    touched(tmp_path, "a.png", "b.png")
    for inputs, count in (([str(tmp_path)], 2), (["a.png", "b.png", "c.png"], 3)):
        with pytest.raises(InvalidInput, match=f"is one file, and there are {count} to write"):
            find(inputs, output, ENCODE)


def test_stdin_and_stdout():
    (item,) = find(["-"], "-", ENCODE).items
    assert (item.source, item.target, item.name) == (None, None, "stdin")
    assert targets(find(["-"], "out", ENCODE)) == ["stdin.npy"]


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    import os

    touched(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert targets(find([str(tmp_path)], "out", ENCODE)) == ["a.npy"]


def test_the_time_grows_with_the_files_and_not_with_their_square(tmp_path):
    names = [f"{index}.png" for index in range(20_000)]
    begun = time.process_time()
    assert len(find(names, str(tmp_path), ENCODE).items) == 20_000
    assert time.process_time() - begun < 5  # 0.2 s; comparing each with each takes more than a minute
