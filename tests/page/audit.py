"""What a page must be for everybody, as axe-core sees it."""

import json

from tests.page.visit import SHOTS, Visit


def audit(visit: Visit, name: str) -> None:
    """axe-core's findings, all of them kept, none of them accepted; and nothing wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe

    visit.shot(name)
    found = Axe().run(visit.page).response
    (SHOTS / f"{name}.json").write_text(json.dumps(found["violations"], indent=1))
    assert [(each["impact"], each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert found["passes"]
    wide = "() => document.documentElement.scrollWidth - innerWidth"
    assert visit.page.evaluate(wide) <= 0
