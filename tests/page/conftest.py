"""Fixtures of the browser's tests, which are left out where playwright is not installed."""

from importlib.util import find_spec

if find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.page.fixtures import browser, folder, running, visit

    __all__ = ["browser", "folder", "running", "visit"]
