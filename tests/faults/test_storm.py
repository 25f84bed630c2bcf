"""Models that are asked for, loaded, unloaded, pinned, uploaded and deleted all at once."""

import asyncio
import gc
import random
import shutil
import weakref
from collections import Counter

import numpy as np
import torch

from app.engine import compute
from app.engine.jobs import Task
from app.errors import ModelBusy, OutOfMemory
from tests.fakes import checkpoint, latent, load, running, submit, value
from tests.service import array_of, npy, serving

MODELS = [checkpoint(f"model {index}") for index in range(4)]
BYTES = MODELS[0].weight_bytes(torch.float32)


async def test_the_cache_s_bytes_are_those_of_its_modules_and_none_in_use_is_freed(monkeypatch):
    """Room for two of four; each module that was ever loaded is followed by a weak reference."""
    loaded, in_forward, wrong = [], [], []
    real = compute.forward

    def followed(*given):
        module = load(*given)
        loaded.append(weakref.ref(module))
        return module

    def forward(module, *given):
        in_forward.append(weakref.ref(module))
        if not any(each.module is module and each.in_use for each in engine.workers[0].cache.residents()):
            wrong.append("a module that is not in use computes")
        try:
            return real(module, *given)
        finally:
            in_forward.pop()

    monkeypatch.setattr(compute, "forward", forward)
    rng = random.Random(0)
    async with running(*MODELS, load=followed, cache_bytes=2 * BYTES) as engine:
        cache = engine.workers[0].cache
        ends: Counter[str] = Counter()
        expected = [(await submit(engine, Task("decode", model), latent()))[0].array for model in MODELS]

        async def one():
            index = rng.randrange(len(MODELS))
            model, what = MODELS[index], rng.choice(("decode",) * 5 + ("load", "unload", "pin", "unpin", "unpin"))
            try:
                if what == "decode":
                    (result,) = await submit(engine, Task("decode", model), latent())
                    if np.abs(result.array.astype(int) - expected[index]).max() > 1:
                        wrong.append(f"{model.name}: another picture")
                elif what == "load":
                    await engine.load(model, "auto")
                elif what == "unload":
                    engine.unload(model)
                elif sum(cache.pinned(each.sha256) for each in MODELS) < 1 or what == "unpin":
                    engine.pin(model, what == "pin")
                ends[what] += 1
            except (ModelBusy, OutOfMemory) as error:
                ends[type(error).__name__] += 1

        async def watch():
            while True:
                await asyncio.sleep(0)
                if cache.nbytes > 2 * BYTES:
                    wrong.append(f"{cache.nbytes} bytes in {2 * BYTES}")
                for each in cache.residents():
                    if (real := sum(part.nbytes for part in each.module.state_dict().values())) != each.nbytes:
                        wrong.append(f"{each.nbytes} bytes of {real}")
                if any(ref() is None for ref in list(in_forward)):
                    wrong.append("a module was freed while it computed")

        watching = asyncio.ensure_future(watch())
        for _ in range(12):
            await asyncio.gather(*(one() for _ in range(25)))
            gc.collect()
            alive = [module for ref in loaded if (module := ref()) is not None]
            assert {id(module) for module in alive} == {id(each.module) for each in cache.residents()}
            del alive
        watching.cancel()
        assert wrong == []
        assert not any(each.in_use for each in cache.residents())
        assert ends["decode"] > 100
        assert min(ends[what] for what in ("load", "unload", "pin", "unpin", "ModelBusy")) > 0
        assert value(engine, "vae_model_evictions_total") >= len(loaded) - 2 > 10


async def test_a_model_that_comes_and_goes_is_whole_or_is_not_there(models, tmp_path):
    folder = tmp_path / "VAE"
    folder.mkdir()
    kept = {name: (models / "VAE" / f"{name}.safetensors").read_bytes() for name in ("kl", "tiny")}
    shutil.copy(models / "VAE" / "kl.safetensors", folder)
    rng, body = random.Random(1), npy(latent(4)[None])
    honest = {
        "decode": {200, 404, 503},
        "put": {201, 409, 429},
        "delete": {200, 404, 409},
        "load": {200, 404, 409, 503},
        "unload": {200, 404, 409},
        "pin": {200, 404},
        "unpin": {200, 404},
    }
    seen: dict[str, Counter] = {what: Counter() for what in honest}
    headers = {"Authorization": "Bearer root", "Accept": "application/x-npy"}
    async with serving(tmp_path, headers=headers, admin_key="root") as service:
        answer = await service.post("/decode?model=kl", content=body)
        right = {answer.headers["X-Model-SHA256"]: array_of(answer)}

        async def one():
            what = rng.choice(("decode",) * 6 + tuple(honest) + ("unpin",))
            if what == "decode":
                answer = await service.post("/decode?model=m", content=body)
            elif what == "put":
                answer = await service.put("/models/m", content=kept["kl"])
            elif what == "delete":
                answer = await service.delete("/models/m")
            else:
                answer = await service.post(f"/models/m/{what}")
            seen[what][answer.status_code] += 1
            assert answer.status_code in honest[what], (what, answer.text)
            if what == "decode" and answer.status_code == 200:
                assert np.array_equal(array_of(answer), right[answer.headers["X-Model-SHA256"]])

        for _ in range(8):
            await asyncio.gather(*(one() for _ in range(12)))
        assert seen["decode"][200] > 0
        assert seen["put"][201] > 0
        assert seen["delete"][200] > 0
        (worker,) = service.engine.workers
        assert not any(each.in_use for each in worker.cache.residents())
        assert service.engine.open_requests == 0
