"""A visit to the page in a real browser: chromium, through playwright, against a service that listens."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
ASTRONAUT = ROOT / "tests" / "pictures" / "astronaut.png"
EMBEDDED = ROOT / "models" / "VAE" / "latentd-small.safetensors"
WEIGHTS = ROOT.parent / "shared" / "weights"
TAEF2 = [WEIGHTS / f"taef2_{part}.pth" for part in ("encoder", "decoder")]
SHOTS = ROOT / "browser-output"
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (  # a browser that calls home would be seen as the page calling other hosts
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def chromium() -> str | None:
    """The browser's command: CHROMIUM, or the first that is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def fill(folder: Path) -> Path:
    """A models folder with the embedded model, and TAEF2 where it is at hand."""
    (folder / "VAE").mkdir(parents=True)
    for path in (EMBEDDED, *(path for path in TAEF2 if path.exists())):
        shutil.copy(path, folder / "VAE")
    return folder


@contextmanager
def browsing() -> Iterator[Browser]:
    """The browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*QUIET])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page, and what it did that it should not have."""

    def __init__(self, page: Page, base: str) -> None:
        self.page = page
        self.base = base
        self.requests: list[str] = []  # METHOD /path
        self.foreign: list[str] = []
        self.console: list[str] = []
        self.refusals = False
        """Whether the service is expected to refuse something, which the browser writes to its console."""
        page.on("request", lambda request: self._note(request.method, request.url))
        page.on("console", lambda message: self._hear(message.type, message.text, message.location["url"]))
        page.on("pageerror", lambda error: self.console.append(str(error)))

    def _note(self, method: str, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("blob", "data"):
            return
        self.requests.append(f"{method} {parts.path}")
        if f"{parts.scheme}://{parts.netloc}" != self.base:
            self.foreign.append(url)

    def _hear(self, kind: str, text: str, url: str) -> None:
        expected = self.refusals or "preview=" in url  # a preview may be refused at any time
        if kind in ("error", "warning") and not (expected and text.startswith("Failed to load resource")):
            self.console.append(text)

    def open(self, fragment: str = "") -> None:
        """Opens the page, and waits for the models."""
        self.page.goto(f"{self.base}/{fragment}")
        self.page.wait_for_selector("#choices input", state="attached")

    def settle(self, cards: int = 1) -> None:
        """Waits until every card has its answer."""
        self.page.wait_for_function(
            "n => document.querySelectorAll('.card').length === n && !document.querySelector('.card[aria-busy=true]')",
            arg=cards,
        )

    def give(self, name: str, content: bytes, kind: str = "application/octet-stream") -> None:
        """Chooses a file; `settle` then waits for the answers to it, and takes no earlier ones for them."""
        self.page.evaluate("document.querySelectorAll('.card').forEach(each => each.setAttribute('aria-busy', 'true'))")
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})

    def facts(self, card: int = 0) -> dict[str, str]:
        """What a card says, by its headings."""
        rows = self.page.locator(".card").nth(card).locator(".facts div").all()
        return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}

    def shot(self, name: str) -> None:
        """Keeps a picture of it all, to be looked at."""
        SHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def check(self) -> None:
        """No errors, and no other host."""
        assert self.console == []
        assert self.foreign == []


@contextmanager
def visiting(
    browser: Browser, base: str, *, width: int = 1280, height: int = 900, dark: bool = False
) -> Iterator[Visit]:
    """A fresh visitor, checked at the end."""
    scheme: Literal["dark", "light"] = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(120_000)  # the first decode of a busy machine
    try:
        visit = Visit(context.new_page(), base)
        yield visit
        visit.check()
    finally:
        context.close()
