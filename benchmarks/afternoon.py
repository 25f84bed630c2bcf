"""The server that one writes in an afternoon: FastAPI, diffusers and Pillow. The peer of `benchmarks.served`.

`python -m benchmarks.afternoon kl|tiny PORT`. One model, in memory from the start, in float32 and for `?precision=bf16`
in that; bodies are .npy, answers PNG. Fair: one forward at a time, so that requests do not fight for the cores, and
neither reading nor writing pictures holds up the next forward or the event loop.
"""

import asyncio
import copy
import io
import sys

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image

from benchmarks.peer import Network, peer


def create_app(network: Network) -> FastAPI:
    """The whole of it."""
    app = FastAPI()
    wide = peer(network)
    vaes = {"fp32": wide, "bf16": copy.deepcopy(wide).to(torch.bfloat16)}
    one_at_a_time = asyncio.Lock()

    @torch.inference_mode()
    def decode(latents: np.ndarray, precision: str) -> np.ndarray:
        vae = vaes[precision]
        z = torch.from_numpy(latents).to(vae.dtype) / vae.config.scaling_factor
        pixels = vae.decode(z).sample
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        uint8: np.ndarray = (pixels * 255).round().to(torch.uint8).numpy()[0]
        return uint8

    def png(picture: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return file.getvalue()

    @app.post("/decode")
    async def answer(request: Request, precision: str = "fp32") -> Response:
        latents = np.load(io.BytesIO(await request.body()), allow_pickle=False)
        async with one_at_a_time:
            picture = await asyncio.to_thread(decode, latents, precision)
        return Response(await asyncio.to_thread(png, picture), media_type="image/png")

    @app.get("/healthz/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    name, port = sys.argv[1:]
    which: Network = "kl" if name == "kl" else "tiny"
    uvicorn.run(create_app(which), host="127.0.0.1", port=int(port), log_level="warning")
