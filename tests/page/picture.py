"""`python -m tests.page.picture docs/page.png`: the page as the README shows it."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.page.visit import ASTRONAUT, browsing, fill, visiting
from tests.service import listening


def main(path: Path) -> None:
    """Takes a picture through the embedded model, and the browser's window to a file."""
    with (
        TemporaryDirectory() as folder,
        listening(fill(Path(folder) / "models")) as (_, port),
        browsing() as browser,
        visiting(browser, f"http://127.0.0.1:{port}", width=1280, height=1180) as visit,
    ):
        visit.open("#split=52&model=latentd-small")
        visit.page.set_input_files("#file", ASTRONAUT)
        visit.settle()
        visit.page.locator("#run").click()  # once more, with the model loaded
        visit.page.wait_for_selector(".card[aria-busy=true]")
        visit.settle()
        visit.page.screenshot(path=path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
