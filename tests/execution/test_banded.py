"""Bands against the whole: the same function for every network, size, band height and precision."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from app.engine.forecast import CountingMode
from app.execution import preparing, winograd
from app.execution.banded import RECOMPUTE, STRIPS, Banded, execute, forecast_bytes, gather
from app.execution.norms import RMSNorm
from app.execution.primitive import Whole
from app.execution.program import record
from app.vae.autoencoder_dc import AutoencoderDC, DCConfig, DCHalf
from app.vae.autoencoder_hunyuan import AutoencoderHunyuan, HunyuanConfig
from app.vae.autoencoder_kl import AutoencoderKL, KLConfig
from app.vae.autoencoder_tiny import AutoencoderTiny, TinyConfig, TinyLayer
from app.vae.kernels import add_kernels


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Operations this small cost a busy machine more in waking a second thread than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CPU = torch.device("cpu")

EXECUTIONS = [
    Banded("strips", 1),  # bands of one row, where the map has few
    Banded("strips", 5000),
    STRIPS,  # bands larger than these pictures
    Banded("recompute", 1),
    Banded("recompute", 5000),
    Banded("recompute", 20_000, budget_bytes=600_000),
    RECOMPUTE,
]


def layer(index, c_in, c_out, **more):
    return TinyLayer(index=index, c_in=c_in, c_out=c_out, **more)


def kl(widths=(32, 64, 64), groups=8, **more):
    torch.manual_seed(0)
    config = KLConfig(widths, widths, 2, 2, 4, norm_groups=groups, **more)
    return AutoencoderKL(config).requires_grad_(False).to(memory_format=torch.channels_last)


def tiny(pool):
    torch.manual_seed(0)
    encoder = (
        layer(0, 3, 16),
        layer(1, 16, 16, block=True),
        layer(2, 16, 24, bias=False, stride=2),
        layer(3, 24, 24, block=True, pool=pool),
        layer(4, 24, 16, bias=False, stride=2, relu=True),
        layer(6, 16, 4),
    )
    decoder = (
        layer(1, 4, 16, relu=True),
        layer(3, 16, 16, block=True, pool=pool),
        layer(6, 16, 24, bias=False, up=True),
        layer(7, 24, 16, block=True),
        layer(10, 16, 16, bias=False, up=True),
        layer(11, 16, 3),
    )
    return AutoencoderTiny(TinyConfig(encoder, decoder)).requires_grad_(False).to(memory_format=torch.channels_last)


class Streaming(torch.nn.Module):
    """What no family has yet: pointwise norms, groups, and edges that go on."""

    def __init__(self, mode="replicate", attends=True):
        super().__init__()
        torch.manual_seed(0)

        def conv(c_in, c_out, kernel=3, **more):
            return torch.nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, padding_mode=mode, **more)

        self.first = torch.nn.ModuleDict({"3": conv(3, 32), "4": conv(4, 32)})
        norms = [RMSNorm(32, bias=i == 1) for i in range(4)]
        for norm in norms:
            for value in norm.parameters():
                torch.nn.init.normal_(value, 1, 0.3)
        self.norms, self.norm = torch.nn.ModuleList(norms), norms[3]
        self.grouped, self.depthwise, self.wide = conv(32, 32, groups=4), conv(32, 32, groups=32), conv(32, 32, 7)
        self.bare = torch.nn.Conv2d(32, 32, 1, groups=2)
        self.q, self.k, self.v, self.proj_out = (torch.nn.Conv2d(32, 32, 1) for _ in range(4))
        self.attends = attends
        self.last = conv(32, 4)
        self.resample = torch.nn.ModuleList([conv(32, 32, stride=2), conv(32, 32)])
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def one_half(self, run, x, channels, up):
        x = run.conv(x, self.first[str(channels)])
        h = run.conv(x, self.grouped, norm=self.norms[0], act=F.silu)
        x = run.conv(h, self.depthwise, norm=self.norms[1], add=x)
        if self.attends:
            x = run.attention(x, self)
        x = run.conv(x, self.bare, then=F.relu)
        x = (
            run.conv(x, self.resample[1], norm=self.norms[2], up=True)
            if up
            else run.conv(x, self.resample[0], pad=(0, 1, 0, 1))
        )
        x = run.conv(x, self.wide, pad=(3, 3, 3, 4))
        return run.conv(x, self.last, norm=self.norms[0], act=F.silu)

    def decode(self, run, z):
        return self.one_half(run, z, 4, up=True)

    def encode(self, run, x):
        return self.one_half(run, x, 3, up=False)


def dc(head=8):
    torch.manual_seed(0)
    half = DCHalf((32, 32, 32), (1, 1, 1), ("res", "res", "vit"), (0, 0, 5), False, head)
    vae = AutoencoderDC(DCConfig(half, half, 4)).requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def hunyuan():
    torch.manual_seed(0)
    vae = AutoencoderHunyuan(HunyuanConfig((64, 128, 128), 1, 2, 4)).requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def with_kernels():
    torch.manual_seed(0)
    vae = AutoencoderKL(KLConfig((64, 64), (64, 64), 1, 1, 4, norm_groups=8)).requires_grad_(False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preparing, "CHANNELS", 64)
        assert add_kernels(vae.to(memory_format=torch.channels_last))
    return vae


FAMILIES = {
    "kl": kl,
    "kl with kernels": with_kernels,
    "kl without attention or 1x1": lambda: kl(mid_attention=False, quant_conv=False, post_quant_conv=False),
    "kl, a channel a group": lambda: kl((32, 32, 32), 32),
    "tiny": lambda: tiny(pool=False),
    "tiny with norms": lambda: tiny(pool=True),
    "linear attention": dc,
    "shuffles": hunyuan,
    "pointwise, to the edge": Streaming,
    "pointwise, to zeros": lambda: Streaming("zeros", attends=False),
}


@pytest.fixture(params=FAMILIES, scope="module")
def vae(request):
    return FAMILIES[request.param]()


def cases(vae, sizes):
    """(network, input) of decodes of latents and encodes of pictures, odd ones among them."""
    torch.manual_seed(1)
    for b, h, w in sizes:
        yield vae.decode, torch.randn(b, 4, h, w)
        odd = (0, 0) if isinstance(vae, AutoencoderDC | AutoencoderHunyuan) else (3, 1)  # these take whole blocks
        yield vae.encode, torch.randn(b, 3, 4 * h + odd[0], 4 * w + odd[1])


@pytest.fixture(autouse=True)
def _kernels_for_small_maps(monkeypatch):
    monkeypatch.setattr(winograd, "LEAST", 100)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=repr)
def test_equals_whole(vae, execution):
    for network, x in cases(vae, [(1, 16, 12), (3, 5, 9), (1, 23, 4), (1, 1, 1)]):
        whole = gather(Whole(), network, x)
        banded = gather(execution, network, x)
        span = (whole.max() - whole.min()).item()
        assert banded.shape == whole.shape
        assert (banded - whole).abs().max() <= 1e-5 * max(span, 1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("execution", [Banded("strips", 5000), Banded("recompute", 5000)], ids=str)
def test_half_precision_is_as_near_the_truth_as_whole(name, execution):
    full, half = FAMILIES[name](), FAMILIES[name]().to(torch.bfloat16)
    sizes = [(2, 20, 16)]
    for (truth, x), (rounded, _) in zip(cases(full, sizes), cases(half, sizes), strict=True):
        exact = gather(Whole(), truth, x)
        whole, banded = (gather(each, rounded, x.bfloat16()).float() for each in (Whole(), execution))
        assert rms(banded - exact) <= 1.1 * rms(whole - exact)


def rms(x):
    return x.square().mean().sqrt().item()


def test_bands_come_in_order_and_cover_the_output():
    vae = kl()
    x = torch.randn(1, 4, 16, 8)
    rows, bands = zip(*execute(Banded("strips", 5000), vae.decode, x), strict=True)
    assert len(bands) > 4
    assert rows[0] == 0
    assert all(
        row + band.shape[2] == following for row, band, following in zip(rows, bands, (*rows[1:], 64), strict=True)
    )
    assert all(band.is_inference() for band in bands)
    assert next(iter(execute(Whole(), vae.decode, x)))[0] == 0


@pytest.mark.parametrize("kind", ["strips", "recompute"])
@pytest.mark.parametrize("half", ["decode", "encode"])
@pytest.mark.parametrize(
    "name",
    [
        "kl",
        "kl with kernels",
        "tiny with norms",
        "linear attention",
        "shuffles",
        "pointwise, to the edge",
        "pointwise, to zeros",
    ],
)
def test_forecast_holds(kind, half, name):
    """The memory counted in a real run lies at most a quarter under the forecast, and never above it."""
    vae = FAMILIES[name]()
    network = getattr(vae, half)
    x = torch.randn(1, 4, 40, 24) if half == "decode" else torch.randn(1, 3, 160, 96)
    for band_elements in (20_000, 100_000):
        execution = Banded(kind, band_elements)
        counted = count(execution, network, x, vae)
        forecast = forecast_bytes(execution, network, tuple(x.shape), x.dtype, x.device)
        assert counted <= forecast <= 1.25 * counted


def count(execution, network, x, vae):
    live = CountingMode([x, *vae.parameters(), *vae.buffers()])
    with torch.inference_mode(), live:
        for _, band in execute(execution, network, x):
            del band
    assert live.alive == 0
    return live.peak


def test_memory_is_a_fraction_of_wholes():
    vae = FAMILIES["kl"]()
    for network, x in ((vae.decode, torch.randn(1, 4, 40, 32)), (vae.encode, torch.randn(1, 3, 160, 128))):
        whole = count(Whole(), network, x, vae)
        assert count(Banded("strips", 40_000), network, x, vae) <= 0.45 * whole
        assert count(Banded("recompute", 40_000), network, x, vae) <= 0.3 * whole


def test_a_budget_buys_the_fastest_plan_that_fits():
    network, shape = kl().decode, (1, 4, 40, 32)
    program = record(network, shape)
    lean = Banded("recompute", 20_000).plan(program, torch.float32, CPU)
    fast = Banded("strips", 20_000).plan(program, torch.float32, CPU)
    for budget in (fast.peak_elements * 4, lean.peak_elements * 4):
        plan = Banded("recompute", 20_000, budget_bytes=budget).plan(program, torch.float32, CPU)
        assert plan.peak_elements * 4 <= budget
    assert Banded("recompute", 20_000, budget_bytes=1 << 40).plan(program, torch.float32, CPU).flops < program.flops
    assert Banded("recompute", budget_bytes=0).plan(program, torch.float32, CPU).peak_elements <= lean.peak_elements * 4


@pytest.mark.parametrize("execution", [Banded("strips", 5000), Banded("recompute", 5000)], ids=str)
def test_pointwise_norms_stream(execution):
    """One walk without attention, none of them for statistics."""
    alone, attending = (record(Streaming(attends=attends).decode, (1, 4, 40, 24)) for attends in (False, True))
    assert [each.keep for each in execution.plan(alone, torch.float32, CPU).passes] == [True]
    assert all(each.keep for each in execution.plan(attending, torch.float32, CPU).passes)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("pad", [None, (0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 0, 0), (2, 1, 0, 2), (0, 3, 2, 0)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (4, 2), (5, 3)])
def test_edges_are_the_same_in_bands(mode, pad, kernel, stride):
    """Every padding at every edge, of odd maps, with bands of one row and of a few."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 4, kernel, stride, padding=1, padding_mode=mode, groups=2)
    norm = torch.nn.GroupNorm(2, 4)

    def network(run_, x):
        return run_.conv(run_.conv(x, conv, pad=pad, act=F.silu), conv, norm=norm, pad=pad)

    for size in ((19, 23), (20, 17)):
        x = torch.randn(2, 4, *size)
        whole = gather(Whole(), network, x)
        for execution in EXECUTIONS:
            torch.testing.assert_close(gather(execution, network, x), whole, atol=1e-5, rtol=1e-5)


def test_whole_is_what_torch_does():
    conv = torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", groups=2)
    x = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(Whole().conv(x, conv), conv(x))
    around = F.pad(x, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(
        Whole().conv(x, conv, pad=(0, 1, 0, 1)), F.conv2d(around, conv.weight, conv.bias, groups=2)
    )
    dilated = torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2)
    torch.testing.assert_close(Whole().conv(x, dilated), dilated(x))


def test_items_of_a_batch_do_not_touch():
    """NaN in one item of a batch leaves the others as they would be alone."""
    vae = kl()
    z = torch.randn(2, 4, 8, 8)
    alone = gather(STRIPS, vae.decode, z[:1])
    z[1] = float("nan")
    both = gather(STRIPS, vae.decode, z)
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0)
    assert both[1].isnan().all()


class Gone(Exception):
    """The client left."""


@pytest.mark.parametrize("kind", ["strips", "recompute"])
def test_cancelled_between_bands_and_freed(kind):
    vae = kl()
    x = torch.randn(1, 4, 16, 16)
    live = CountingMode([x, *vae.parameters()])
    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls == 40:
            raise Gone

    with torch.inference_mode(), live:
        with pytest.raises(Gone):
            gather(Banded(kind, 5000), vae.decode, x, check=check)
        gc.collect()
    assert calls == 40
    assert live.peak > 0
    assert live.alive == 0


def test_a_consumer_that_stops_frees_the_rest():
    vae = kl()
    bands = execute(Banded("strips", 5000), vae.decode, torch.randn(1, 4, 16, 16))
    _, band = next(bands)
    storage = weakref.ref(band.untyped_storage())
    bands.close()
    del band
    assert storage() is None


def test_runs_on_meta():
    vae = kl().to("meta")
    for execution in (Banded("strips", 5000), Banded("recompute", 5000)):
        assert gather(execution, vae.decode, torch.empty(2, 4, 9, 7, device="meta")).shape == (2, 3, 36, 28)


def test_tells_its_passes(caplog):
    with caplog.at_level("DEBUG", logger="app.vae"):
        gather(Banded("strips", 5000), kl().decode, torch.randn(1, 4, 8, 8))
    assert "strips pass 1/" in caplog.text


def test_the_network_is_left_alone():
    """No state changes meaning: weights and gradients flags are the same after a banded run."""
    vae = kl()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    x = torch.randn(1, 4, 8, 8)
    kept = x.clone()
    gather(RECOMPUTE, vae.decode, x)
    assert torch.equal(x, kept)
    assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())


def test_an_activation_before_an_enlargement():
    """No family has it yet; the primitive allows it."""
    norm, conv = torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 8, 3, padding=1)
    wide = torch.nn.Conv2d(8, 8, 7)

    def network(run_, x):
        x = run_.conv(x, conv)
        x = run_.conv(x, conv, norm=norm, act=F.silu, up=True, then=F.relu)
        return run_.conv(x, wide, act=F.relu, pad=(3, 2, 2, 3))

    x = torch.randn(2, 8, 9, 5)
    for execution in EXECUTIONS:
        torch.testing.assert_close(gather(execution, network, x), gather(Whole(), network, x), atol=1e-5, rtol=1e-5)
