import os

import pytest
from playwright.sync_api import Route

from tests.page.audit import audit
from tests.page.visit import ASTRONAUT, EMBEDDED, TAEF2, visiting
from tests.service import latent, listening, npy

pytestmark = pytest.mark.browser
WIDTHS = (360, 768, 1440)
MODELS = "#model=latentd-small" + ("&model=taef2" if TAEF2[0].exists() else "")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_state_is_for_everybody(browser, running, width, dark):
    with visiting(browser, running.base, width=width, dark=dark) as visit:
        visit.refusals = True
        name = f"{width}-{'dark' if dark else 'light'}"
        visit.open(MODELS)
        audit(visit, f"empty-{name}")
        visit.page.set_input_files("#file", ASTRONAUT)
        visit.settle(MODELS.count("model="))
        audit(visit, f"done-{name}")
        visit.give("a.npy", npy(latent(1, 5, 4, 4)))
        visit.settle(MODELS.count("model="))
        audit(visit, f"error-{name}")
        visit.page.locator("#open-key").click()
        visit.page.locator("#key").fill("the-admin")
        audit(visit, f"key-{name}")
        visit.page.keyboard.press("Enter")
        visit.page.locator("#show-service").click()
        visit.page.wait_for_selector("#models button")
        visit.page.locator("#plan-form button").click()
        visit.page.wait_for_selector("#plan b")
        audit(visit, f"service-{name}")
        visit.page.get_by_role("button", name="delete latentd-small", exact=True).click()
        audit(visit, f"delete-{name}")


def test_everything_is_reached_by_keys(visit):
    visit.open()
    visit.give("a.npy", npy(latent()))
    visit.settle()
    visit.page.locator("h1").click()
    reached = set()
    for _ in range(60):
        visit.page.keyboard.press("Tab")
        reached.add(visit.page.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 12)"))
    wanted = {"show-playground", "show-service", "open-key", "file", "run", "copy-link", "latents", "seed", "tiling"}
    assert wanted | {"PNG", ".npy", "Safetensors", "Zero it", "Multiply", "Whole grid"} <= reached


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_many_models_are_found_by_a_part_of_their_name(browser, tmp_path, dark):
    (tmp_path / "VAE").mkdir()
    for number in range(24):
        os.link(EMBEDDED, tmp_path / "VAE" / f"a-vae-with-a-long-name-number-{number:02}.safetensors")
    with listening(tmp_path) as (_, port), visiting(browser, f"http://127.0.0.1:{port}", width=360, dark=dark) as visit:
        visit.open()
        visit.page.locator("#filter").fill("NUMBER-1")
        assert visit.page.locator("#choices li:visible").count() == 10
        audit(visit, f"many-{'dark' if dark else 'light'}")
        visit.page.locator("#show-service").click()
        visit.page.wait_for_selector("#models tr")
        audit(visit, f"many-service-{'dark' if dark else 'light'}")


def test_it_says_that_it_loads_and_that_there_is_nothing(browser, tmp_path):
    (tmp_path / "VAE").mkdir()
    with listening(tmp_path) as (_, port), visiting(browser, f"http://127.0.0.1:{port}") as visit:
        held: list[Route] = []

        def hold(route):
            held.append(route)

        visit.page.route("**/models", hold)
        visit.page.goto(visit.base)
        visit.page.wait_for_selector("#choices :text('Loading…')")
        audit(visit, "loading")
        held[0].continue_()
        visit.page.wait_for_selector("#choices :text('There is no VAE yet')")
        audit(visit, "no-models")
        visit.page.unroute("**/models")
        visit.page.locator("#show-service").click()
        visit.page.wait_for_selector("#tiles b")
        audit(visit, "no-models-service")
