"""`python -m benchmarks.png`: the PNG writer beside Pillow, on photographs at 1024x1024, in milliseconds and bytes."""

import io
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import skimage.data
from PIL import Image

from app.wire.png import write_png
from benchmarks.pairs import Timed, alternate, milliseconds, speedup, table

SIDE = 1024
PICTURES = ("astronaut", "coffee", "chelsea")


def photograph(name: str) -> np.ndarray:
    """The centre square of one of scikit-image's photographs, (SIDE, SIDE, 3) uint8."""
    image = Image.fromarray(getattr(skimage.data, name)())
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge))
    return np.array(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def pillow(pixels: np.ndarray, level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def timed(write: Callable[[], bytes]) -> Timed:
    def run() -> float:
        start = time.perf_counter()
        write()
        return time.perf_counter() - start

    return run


def main() -> None:
    rows = []
    for name in PICTURES:
        pixels = photograph(name)
        writers = {
            "ours": partial(write_png, pixels),
            "Pillow 1": partial(pillow, pixels, 1),
            "Pillow 6": partial(pillow, pixels, 6),
        }
        seconds = alternate({key: timed(write) for key, write in writers.items()}, rounds=9)
        sizes = {key: len(write()) for key, write in writers.items()}
        for key in writers:
            rows.append(
                [
                    name,
                    key,
                    milliseconds(seconds[key]),
                    speedup(seconds["ours"], seconds[key]),
                    f"{sizes[key] >> 10}",
                    f"{sizes[key] / sizes['Pillow 1']:.3f}",
                ]
            )
    print(table(["picture", "writer", "ms", "ours is faster", "KiB", "size / Pillow 1"], rows))
    ours = [float(row[2]) for row in rows if row[1] == "ours"]
    print(f"\nmedian of ours: {median(ours):.1f} ms")


if __name__ == "__main__":
    main()
