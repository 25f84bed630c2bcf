import io
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Route
from safetensors.numpy import load, save

from tests.page.visit import TAEF2
from tests.service import latent, npy, occupied, picture

pytestmark = pytest.mark.browser
SMALL = "latentd-small"
BOTH = [SMALL, *(["taef2"] if TAEF2[0].exists() else [])]


def ask(visit, path, body, accept="*/*", **query):
    answer = httpx.post(visit.base + path, content=body, params=query, headers={"Accept": accept}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def decoded(visit, array, **query):
    answer = ask(visit, "/decode", npy(array), "image/png", model=SMALL, **query)
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def saved(visit, name, card=0):
    with visit.page.expect_download() as download:
        visit.page.locator(".card").nth(card).get_by_role("link", name=name, exact=True).click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def shown(visit):
    return np.asarray(Image.open(io.BytesIO(saved(visit, "PNG")[1])))


@pytest.mark.parametrize("fit", ["pad", "crop", "resize"])
def test_pictures_go_through_every_vae_that_is_ticked(visit, fit):
    body = picture(150, 100)
    visit.open()
    for name in BOTH:
        visit.page.locator(f"#choices input[value='{name}']").check()
    visit.page.select_option("#fit", fit)
    visit.give("a.png", body, "image/png")
    visit.settle(len(BOTH))
    visit.shot(f"models-{fit}")
    for index, name in enumerate(BOTH):
        facts, compared = visit.facts(index), ask(visit, "/compare", body, "application/json", models=name, fit=fit)
        row = compared.json()["models"][0]
        if fit == "pad" or (fit == "crop" and len(BOTH) == 1):  # /compare resizes the original, the page the answer
            assert float(facts["PSNR"].split()[0]) == pytest.approx(row["psnr_db"], abs=0.006)
            assert float(facts["SSIM"]) == pytest.approx(row["ssim"], abs=1e-4)
        assert facts["Encoded"] == facts["Decoded"] == "fp32/whole"
        assert float(facts["SSIM"]) > 0.5
        legend = visit.page.locator(".card").nth(index).locator(".times .legend").all_inner_texts()
        assert [re.findall("[a-z]{4,}", text) for text in legend] == [["read", "queue", "load", "compute", "write"]] * 2


def test_the_files_that_it_saves_are_the_services(visit):
    body = picture(64, 48)
    visit.open()
    visit.give("flower.png", body, "image/png")
    visit.settle()
    name, content = saved(visit, ".npy")
    assert name == f"flower.{SMALL}.npy"
    encoded = np.load(io.BytesIO(ask(visit, "/encode", body, model=SMALL).content))
    np.testing.assert_array_equal(np.load(io.BytesIO(content)), encoded)
    name, content = saved(visit, "Safetensors")
    np.testing.assert_array_equal(load(content)["latents"], encoded)
    again = ask(visit, "/decode", content, model=SMALL)
    assert (again.headers["x-image-size"], again.headers["x-latents"]) == ("64x48", "scaled")
    np.testing.assert_array_equal(shown(visit), np.asarray(Image.open(io.BytesIO(again.content))))


def test_one_slider_moves_all_pictures_by_key_and_by_pointer(visit):
    visit.open()
    visit.give("a.png", picture(64, 64), "image/png")
    visit.settle()
    split = visit.page.locator("#split")
    split.focus()
    visit.page.keyboard.press("End")
    clip = visit.page.locator(".split .original").evaluate("node => getComputedStyle(node).clipPath")
    assert clip in ("inset(0px 0% 0px 0px)", "inset(0px calc(0%) 0px 0px)", "inset(0px)")
    box = visit.page.locator(".split").bounding_box()
    visit.page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + 20)
    assert split.input_value() == "25"
    visit.page.locator("#gain").focus()
    visit.page.keyboard.press("Home")
    filters = visit.page.locator(".difference").evaluate("node => getComputedStyle(node).filter")
    assert filters == "brightness(1)"
    assert visit.page.locator("#gain-value").inner_text() == "1"


def test_the_difference_is_the_pictures_difference(visit):
    visit.open("#gain=1")
    visit.give("a.png", picture(300, 300), "image/png")
    visit.settle()
    difference = visit.page.locator(".difference")
    style = "{ position: 'fixed', left: 0, top: 0, width: '300px', borderRadius: 0, zIndex: 9 }"
    difference.evaluate(f"node => Object.assign(node.style, {style})")
    pixels = np.asarray(Image.open(io.BytesIO(difference.screenshot())).convert("RGB")).astype(int)
    original = np.asarray(Image.open(io.BytesIO(picture(300, 300)))).astype(int)
    expected = np.abs(shown(visit).astype(int) - original)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected)[4:-4, 4:-4].max() <= 2


def test_each_channel_has_its_picture_and_its_range(visit):
    array = latent(1, 4, 6, 5)
    visit.open()
    visit.give("a.npy", npy(array))
    visit.settle()
    texts = visit.page.locator(".channels button span").all_inner_texts()
    assert texts[0] == "first 3 components"
    for values, text in zip(array[0].astype(float), texts[1:], strict=True):
        least, greatest = (float(part.replace("−", "-")) for part in text.split(" … "))
        assert [least, greatest] == pytest.approx([values.min(), values.max()], rel=0.01)
    channel = "n => [...n.getContext('2d').getImageData(0, 0, n.width, n.height).data].filter((_, i) => i % 4 === 0)"
    grey = visit.page.locator(".channels canvas").nth(2).evaluate(channel)
    values = array[0, 1].astype(float)
    expected = (values - values.min()) / (values.max() - values.min()) * 255
    assert np.abs(np.array(grey).reshape(6, 5) - expected).max() <= 1


def test_the_first_three_components_are_those_of_a_decomposition(visit):
    array = latent(1, 4, 16, 16, dtype=np.float32) * np.array([5, 3, 1, 0.1], np.float32)[:, None, None]
    visit.open()
    visit.give("a.npy", npy(array))
    visit.settle()
    pixels = "n => [...n.getContext('2d').getImageData(0, 0, 16, 16).data]"
    found = np.array(visit.page.locator(".channels canvas").first.evaluate(pixels)).reshape(256, 4)[:, :3]
    flat = array[0].reshape(4, -1).T.astype(float)
    centred = flat - flat.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(flat))
    for colour in range(3):
        axis = axes[:, -1 - colour] * np.sign(axes[np.abs(axes[:, -1 - colour]).argmax(), -1 - colour])
        expected = 127.5 + 127.5 * (centred @ axis) / (2.5 * np.sqrt(variances[-1 - colour]))
        assert np.abs(found[:, colour] - expected.clip(0, 255)).max() < 3


def test_painting_by_pointer_zeroes_a_region_of_a_channel(visit):
    array = latent(1, 4, 8, 8)
    visit.open()
    visit.give("a.npy", npy(array))
    visit.settle()
    np.testing.assert_array_equal(shown(visit), decoded(visit, array))
    visit.page.get_by_role("button", name="Channel 2").click()
    board = visit.page.locator(".board canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    step = box["width"] / 8
    visit.page.mouse.move(box["x"] + 2.5 * step, box["y"] + 1.5 * step)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + 4.5 * step, box["y"] + 2.5 * step)
    visit.page.mouse.up()
    visit.shot("painting")
    visit.page.get_by_role("button", name="Zero it").click()
    visit.settle()
    painted = array.astype(np.float32)
    painted[0, 2, 1:3, 2:5] = 0
    np.testing.assert_array_equal(np.load(io.BytesIO(saved(visit, ".npy")[1])), painted)
    np.testing.assert_array_equal(shown(visit), decoded(visit, painted))
    visit.page.get_by_role("button", name="Undo").click()
    visit.settle()
    np.testing.assert_array_equal(shown(visit), decoded(visit, array))


def test_painting_by_keys_alone_scales_a_channel(visit):
    array = latent(1, 4, 8, 8)
    visit.open()
    visit.give("a.npy", npy(array))
    visit.settle()
    visit.page.get_by_role("button", name="Channel 0").focus()
    visit.page.keyboard.press("Enter")
    for label, value in {"width": "3", "Factor": "0.5"}.items():
        visit.page.get_by_label(label, exact=True).focus()
        visit.page.keyboard.press("Control+a")
        visit.page.keyboard.type(value)
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Space")  # Multiply
    visit.settle()
    painted = array.astype(np.float32)
    painted[0, 0, :, :3] *= 0.5
    np.testing.assert_array_equal(shown(visit), decoded(visit, painted))
    visit.page.get_by_role("button", name="Start over").click()
    visit.settle()
    np.testing.assert_array_equal(shown(visit), decoded(visit, array))


@pytest.mark.parametrize("convention", ["scaled", "raw"])
def test_the_switch_says_what_an_npy_does_not(visit, convention):
    visit.open(f"#latents={convention}")
    visit.give("a.npy", npy(latent()))
    visit.settle()
    assert visit.facts()["Latent"] == f"4 × 4 × 4, {convention}"


def test_a_latent_says_its_own_convention(visit):
    tensors = {"latent_tensor": latent(1, 4, 4, 4, dtype=np.float32)}
    visit.open("#latents=raw")
    visit.give("b.safetensors", save(tensors, {"convention": "scaled", "image_size": "30x31"}))
    visit.settle()
    assert visit.facts()["Latent"].endswith("scaled")
    assert visit.facts()["Picture"] == "30x31"
    visit.open("#latents=scaled")
    visit.give("a.latent", save(tensors | {"latent_format_version_0": np.zeros(0, np.float32)}))
    visit.settle()
    assert visit.facts()["Latent"].endswith("raw")


def test_why_the_plan_is_not_the_first_choice_and_what_looks_wrong_is_told(visit):
    visit.open("#tiling=always")
    visit.give("a.npy", npy(latent(1, 4, 8, 8) * np.float16(10)))
    visit.settle()
    assert visit.facts()["Decoded"] == "fp32/strips, because: requested"
    assert "standard deviation" in visit.page.locator(".card .warning").inner_text()


def test_of_several_paintings_the_last_one_counts(visit):
    array = latent(1, 4, 8, 8)
    visit.open()
    visit.give("a.npy", npy(array))
    visit.settle()
    click = "name => [...document.querySelectorAll('.paint button')].find((each) => each.textContent === name).click()"
    for name in ("Zero it", "Undo", "Multiply"):
        visit.page.evaluate(click, name)
    visit.settle()
    assert visit.facts()["Latent"].endswith("painted on")
    np.testing.assert_array_equal(shown(visit), decoded(visit, array.astype(np.float32) * np.float32(1.5)))


def test_a_slow_decode_of_what_was_painted_is_preceded_by_a_preview(visit):
    page = visit.page
    held: list[Route] = []
    painted: list[bool] = []
    visit.open("#model=latentd-small")
    # The first decode says that it was slow, later ones are held, and the preview's map is there already.
    timing = {"Server-Timing": "compute;dur=900"}

    def decode(route):
        if "preview=" in route.request.url:
            sketch = io.BytesIO()
            Image.new("RGB", (4, 4), "red").save(sketch, "WEBP")
            return route.fulfill(body=sketch.getvalue(), content_type="image/webp")
        if painted:
            return held.append(route)
        answer = route.fetch()
        return route.fulfill(response=answer, headers=answer.headers | timing)

    page.route("**/decode?**", decode)
    visit.give("a.npy", npy(latent()))
    visit.settle()
    painted.append(True)
    page.get_by_role("button", name="Zero it").click()
    page.wait_for_selector(".state:text-is('Decoding… this is a preview')")
    assert page.locator("img.decoded").evaluate("image => image.decode().then(() => image.naturalWidth)") == 4
    held[0].continue_()
    visit.settle()
    assert page.locator("img.decoded").evaluate("image => image.decode().then(() => image.naturalWidth)") == 32


@pytest.mark.parametrize(
    "header",
    [
        "5",
        "null",
        '{"a": 5}',
        '{"latents": {"dtype": "F16", "shape": 4, "data_offsets": [0, 4]}}',
        '{"__metadata__": null}',
    ],
)
def test_a_file_that_this_page_cannot_read_is_left_to_the_service(visit, header):
    visit.refusals = True
    visit.open()
    visit.give("a.safetensors", len(header).to_bytes(8, "little") + header.encode() + b"1234")
    visit.settle()
    assert "HTTP 4" in visit.page.locator(".card .problem").inner_text()


def test_of_a_batch_one_is_chosen(visit):
    array = latent(3, 4, 4, 4)
    visit.open()
    visit.give("a.npy", npy(array))
    visit.settle()
    visit.page.locator("#item").fill("2")
    visit.page.locator("#run").click()
    visit.page.wait_for_timeout(50)
    visit.settle()
    np.testing.assert_array_equal(shown(visit), decoded(visit, array[2]))


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(visit, how):
    visit.open()
    give = """([bytes, how]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "clip.png", { type: "image/png" }));
        const init = { bubbles: true, cancelable: true };
        document.getElementById("drop").dispatchEvent(
            how === "paste" ? new ClipboardEvent(how, { ...init, clipboardData: data })
                            : new DragEvent(how, { ...init, dataTransfer: data }));
    }"""
    visit.page.evaluate(give, [list(picture(32, 32)), how])
    visit.settle()
    assert visit.page.locator("#source-text").inner_text() == "clip.png, 32 × 32"


def test_a_link_restores_models_and_settings(visit):
    visit.open()
    for name in BOTH:
        visit.page.locator(f"#choices input[value='{name}']").check()
    visit.page.select_option("#latents", "raw")
    visit.page.select_option("#posterior", "sample")
    visit.page.locator("#seed").fill("7")
    visit.give("a.png", picture(), "image/png")
    visit.settle(len(BOTH))
    visit.page.locator("#gain").fill("20")
    link = visit.page.url
    visit.page.goto("about:blank")
    visit.page.goto(link)
    visit.page.wait_for_selector("#choices input")
    ticked = visit.page.locator("#choices input:checked").evaluate_all("boxes => boxes.map((box) => box.value)")
    assert ticked == BOTH
    assert [visit.page.locator(name).input_value() for name in ("#latents", "#posterior", "#seed", "#gain")] == [
        *("raw", "sample", "7", "20")
    ]
    visit.open("#model=gone&precision=fp64")
    visit.page.wait_for_function("document.getElementById('status').textContent.includes('gone')")
    assert visit.page.locator("#precision").input_value() == "auto"


def test_what_the_service_refuses_is_told_as_text(visit):
    visit.refusals = True
    visit.open()
    visit.give("a.npy", npy(latent(1, 5, 4, 4)))
    visit.settle()
    problem = visit.page.locator(".card .problem").inner_text()
    assert "channels" in problem
    assert "HTTP 422" in problem
    visit.shot("error")
    visit.give("<img src=x>.png", b"no picture", "image/png")
    visit.settle()
    assert "HTTP 415" in visit.page.locator(".card .problem").inner_text()
    assert visit.page.locator("#choices").inner_text().count("<b>broken<b>") == 1
    assert visit.page.locator("b:has-text('broken'), img[src=x]").count() == 0


def test_a_run_is_stopped(visit, running):
    visit.open()
    with occupied(running.server.engine):
        visit.give("a.png", picture(), "image/png")
        visit.page.wait_for_selector(".card[aria-busy=true]")
        visit.shot("busy")
        visit.page.locator("#stop").click()
        visit.settle()
        assert "Stopped." in visit.page.locator(".card").inner_text()
    assert visit.page.locator("#stop").is_hidden()
