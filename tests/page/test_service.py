import shutil

import pytest

from tests.page.audit import audit
from tests.page.visit import EMBEDDED, visiting
from tests.service import latent, listening, npy, occupied, picture

pytestmark = pytest.mark.browser
SMALL = EMBEDDED.stem
ROW = f"#models tr:has(th:text-is('{SMALL}'))"


def use_key(visit, key):
    visit.page.locator("#key").fill(key)
    visit.page.keyboard.press("Enter")


@pytest.fixture
def shown(visit):
    visit.open("#view=service")
    visit.page.wait_for_selector("#models tr")
    return visit


def test_every_model_has_its_row(shown):
    assert "4 channels" in shown.page.locator(ROW).inner_text()
    assert "3.4 M parameters" in shown.page.locator(ROW).inner_text()
    assert shown.page.locator("#models tr:has-text('<b>broken<b>') .wrong").count() == 1
    assert "cpu" in shown.page.locator("#memory").inner_text()


def test_the_plan_of_a_typed_in_size(shown):
    shown.page.select_option("#plan-model", SMALL)
    shown.page.locator("#plan-form [name=width]").fill("512")
    shown.page.locator("#plan-form button").click()
    shown.page.wait_for_selector("#plan b")
    assert shown.page.locator("#plan b").inner_text().startswith("fp32/whole on cpu, ")
    assert "fp32/strips" in shown.page.locator("#plan").inner_text()


def test_a_plan_that_is_refused_is_told(shown):
    shown.refusals = True
    shown.page.locator("#plan-form").evaluate("form => (form.noValidate = true)")
    shown.page.locator("#plan-form [name=width]").fill("0")
    shown.page.locator("#plan-form button").click()
    shown.page.wait_for_selector("#problem .problem")
    assert "width" in shown.page.locator("#problem").inner_text()


def test_the_admin_loads_pins_and_unloads(shown):
    page = shown.page
    assert page.locator(f"{ROW} button").count() == 0
    page.locator("#open-key").click()
    use_key(shown, "the-admin")
    row = page.locator(ROW)
    row.get_by_role("button", name="load", exact=False).first.click()
    page.wait_for_selector(f"{ROW} td:has-text('cpu fp32')")
    for action, text in {"pin": "pinned", "unpin": "cpu fp32", "retest": "cpu fp32", "unload": "–"}.items():
        row.get_by_role("button", name=f"{action} {SMALL}", exact=True).click()
        page.wait_for_selector(f"#status:text-is('{SMALL}: {action} done')")
        page.wait_for_selector(f"{ROW} td:nth-child(5):has-text('{text}')")
    shown.shot("admin")


def test_a_key_that_does_not_open_it_is_told(shown):
    shown.refusals = True
    shown.page.locator("#open-key").click()
    use_key(shown, "wrong")
    shown.page.locator(ROW).get_by_role("button", name=f"pin {SMALL}", exact=True).click()
    shown.page.wait_for_selector("#problem .problem")
    assert "not the admin key" in shown.page.locator("#problem").inner_text()


def test_the_queue_and_the_figures_move(shown, running):
    with occupied(running.server.engine):
        for side in (4, 5, 6):  # three sizes are three batches, of which one waits for the device and not in the queue
            body = list(npy(latent(1, 4, side, 4)))
            send = "body => void fetch('decode?model=latentd-small', { method: 'POST', body: new Uint8Array(body) })"
            shown.page.evaluate(send, body)
        shown.page.wait_for_selector("#queue td:has-text('decode')")
        shown.shot("service-busy")
    shown.page.wait_for_selector("#queue :text('Nothing waits.')")
    shown.page.wait_for_selector("#latency td:has-text('last minute')")
    assert "fp32/whole" in shown.page.locator("#modes").inner_text()
    assert "up" in shown.page.locator("#tiles").inner_text()


def test_the_models_are_listed_again_when_the_metrics_say_so(shown, folder):
    lists, readings = shown.requests.count("GET /models"), shown.requests.count("GET /metrics")
    while shown.requests.count("GET /metrics") < readings + 2:
        shown.page.wait_for_timeout(100)
    assert shown.requests.count("GET /models") == lists
    shutil.copy(EMBEDDED, folder / "VAE" / "another.safetensors")
    shown.page.wait_for_selector("#models th:text-is('another')")
    (folder / "VAE" / "another.safetensors").unlink()
    shown.page.wait_for_selector("#models th:text-is('another')", state="detached")


def test_nothing_is_asked_while_nobody_looks(shown):
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    shown.page.evaluate(hide, True)
    shown.page.wait_for_timeout(500)  # for a reading that is under way
    before = shown.requests.count("GET /metrics")
    shown.page.wait_for_timeout(2500)
    assert shown.requests.count("GET /metrics") == before
    with shown.page.expect_request("**/metrics"):
        shown.page.evaluate(hide, False)
    shown.page.locator("#show-playground").click()
    shown.page.wait_for_timeout(500)
    before = shown.requests.count("GET /metrics")
    shown.page.wait_for_timeout(2500)
    assert shown.requests.count("GET /metrics") == before


def test_the_key_is_asked_for_and_kept_for_the_tab_alone(browser, folder):
    with listening(folder, api_keys="sesame", metrics_public=False) as (_, port):
        base = f"http://127.0.0.1:{port}"
        with visiting(browser, base) as visit:
            visit.refusals = True
            visit.page.goto(base)
            visit.page.wait_for_selector("#key-dialog[open]")
            visit.shot("key")
            use_key(visit, "wrong")
            visit.page.wait_for_selector("#key-dialog[open] :text('this key is not known')")
            use_key(visit, "sesame")
            visit.page.wait_for_selector("#choices input")
            assert visit.page.locator("#problem").inner_text() == ""
            visit.give("a.png", picture(), "image/png")
            visit.settle()
            assert "PSNR" in visit.facts()
            visit.page.locator("#show-service").click()
            visit.page.wait_for_selector("#models tr")
            stored = "() => [localStorage.length, document.cookie, Object.values(sessionStorage).join()]"
            assert visit.page.evaluate(stored) == [0, "", "sesame"]
            assert "sesame" not in visit.page.url
            other = visit.page.context.new_page()  # another tab
            other.goto(base)
            other.wait_for_selector("#key-dialog[open]")
            visit.page.locator("#open-key").click()
            visit.page.locator("#forget-key").click()
            visit.page.wait_for_selector("#key-dialog[open] :text('a key is needed')")


def as_admin(shown):
    shown.page.locator("#open-key").click()
    use_key(shown, "the-admin")
    shown.page.wait_for_selector("#upload-form")


def test_nobody_else_uploads_or_deletes(shown):
    assert not shown.page.locator("#upload-form").is_visible()
    assert shown.page.locator("#models button").count() == 0


def test_the_admin_uploads_and_deletes(shown, folder):
    page = shown.page
    as_admin(shown)
    page.set_input_files("#upload-file", {"name": "New.safetensors", "mimeType": "", "buffer": EMBEDDED.read_bytes()})
    assert page.locator("#upload-name").input_value() == "New"
    page.locator("#upload-name").fill(SMALL)
    page.locator("#upload-send").click()
    page.wait_for_selector(f"#status:has-text('There is a model {SMALL}')")
    assert not [each for each in shown.requests if each.startswith("PUT")]
    page.locator("#upload-name").fill("New")
    page.locator("#upload-send").click()
    page.wait_for_selector("#status:text-is('New: uploaded')")
    page.wait_for_selector("#models th:text-is('New')")
    assert (folder / "VAE" / "New.safetensors").read_bytes() == EMBEDDED.read_bytes()
    assert not page.locator("#upload-progress").is_visible()
    delete = page.locator("#models").get_by_role("button", name="delete New", exact=True)
    delete.click()
    page.wait_for_selector("#delete-dialog[open] :text('Delete New?')")
    shown.shot("delete")
    page.keyboard.press("Enter")  # what has the focus keeps it
    assert (folder / "VAE" / "New.safetensors").exists()
    delete.click()
    page.keyboard.press("Escape")
    delete.click()
    page.locator("#delete-dialog .danger").click()
    page.wait_for_selector("#status:text-is('New: deleted')")
    page.wait_for_selector("#models th:text-is('New')", state="detached")
    assert page.evaluate("document.activeElement.id") == "models-table"
    assert not (folder / "VAE" / "New.safetensors").exists()
    assert [each for each in shown.requests if "New" in each] == ["PUT /models/New", "DELETE /models/New"]


def test_an_upload_says_how_far_it_is_and_is_cancelled(shown, folder):
    page = shown.page
    as_admin(shown)
    network = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 200_000}
    network.send("Network.emulateNetworkConditions", slow)
    page.set_input_files("#upload-file", {"name": "slow.safetensors", "mimeType": "", "buffer": EMBEDDED.read_bytes()})
    page.locator("#upload-send").click()
    page.wait_for_function("() => document.getElementById('upload-bar').value > 0")
    page.wait_for_selector("#upload-text:has-text(' of ')")
    audit(shown, "upload")
    page.locator("#upload-cancel").click()
    page.wait_for_selector("#status:has-text('the upload was cancelled')")
    assert not page.locator("#upload-progress").is_visible()
    assert page.locator("#upload-send").is_enabled()
    network.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": -1})
    until_gone = "() => !document.querySelector('#models').innerText.includes('slow')"
    page.wait_for_function(until_gone)
    assert not (folder / "VAE" / "slow.safetensors").exists()


def test_an_upload_or_a_deletion_that_is_refused_is_told(shown):
    shown.refusals = True
    page = shown.page
    as_admin(shown)
    page.set_input_files("#upload-file", {"name": "not.safetensors", "mimeType": "", "buffer": b"not a model"})
    page.locator("#upload-send").click()
    page.wait_for_selector("#problem .problem")
    assert "HTTP 422" in page.locator("#problem").inner_text()
    assert page.locator("#upload-name").input_value() == "not"  # to be mended
    row = page.locator(ROW)
    row.get_by_role("button", name=f"pin {SMALL}", exact=True).click()
    page.wait_for_selector(f"#status:text-is('{SMALL}: pin done')")
    row.get_by_role("button", name=f"delete {SMALL}", exact=True).click()
    page.locator("#delete-dialog .danger").click()
    page.wait_for_selector("#problem :text('HTTP 409')")
    row.get_by_role("button", name=f"unpin {SMALL}", exact=True).click()
    page.wait_for_selector(f"#status:text-is('{SMALL}: unpin done')")
