import io

import pytest
from PIL import Image

from app.wire.avif.boxes import boxes
from app.wire.avif.still import Still, head_of
from tests.wire.av1 import SEQUENCE, reduced, unit

DATA = unit(SEQUENCE, reduced(20, 12))
PICTURE = Still(b"\x81\x00\x0c\0", [b"nclx\0\1\0\x0d\0\6\x80"], len(DATA))


@pytest.mark.parametrize(("alpha", "mode"), [(False, "RGB"), (True, "RGBA")])
def test_libavif_reads_it(alpha, mode):
    pictures = [PICTURE, Still(b"\x81\x00\x1c\0", [], len(DATA))] if alpha else [PICTURE]
    with Image.open(io.BytesIO(head_of(20, 12, pictures, premultiplied=alpha) + DATA * len(pictures))) as image:
        assert (image.format, image.size, image.mode) == ("AVIF", (20, 12), mode)


def test_the_data_lie_where_it_says():
    body = head_of(20, 12, [PICTURE]) + DATA
    view = memoryview(body)
    found = {name: bytes(view[where]) for name, where in boxes(view, slice(0, len(body)))}
    assert list(found) == [b"ftyp", b"meta", b"mdat"]
    assert found[b"mdat"] == DATA
    assert (body.index(DATA)).to_bytes(4) + len(DATA).to_bytes(4) in found[b"meta"]
