import re
from pathlib import Path

import pytest

from app.api.page import FILES, FOLDER
from tests.service import refused, serving

PATHS = ["/", *(f"/page/{name}" for name in sorted(FILES) if name != "index.html")]
MARKUP = "javascript:|innerHTML|outerHTML|insertAdjacentHTML|document\\.write|DOMParser|srcdoc|eval\\(|Function\\("


@pytest.fixture(scope="module")
async def answers(models):
    async with serving(models) as service:
        yield {path: await service.get(path) for path in PATHS}


async def test_every_file_of_the_folder_is_served(answers):
    assert set(FILES) == {path.name for path in FOLDER.iterdir()}
    for path, answer in answers.items():
        name = path.removeprefix("/page/").strip("/") or "index.html"
        assert answer.status_code == 200
        assert answer.content == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/page.css", "text/css; charset=utf-8"),
        ("/page/main.js", "text/javascript; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
async def test_each_has_its_type_and_a_browser_is_to_believe_it(answers, path, kind):
    assert answers[path].headers["content-type"] == kind
    assert answers[path].headers["x-content-type-options"] == "nosniff"


async def test_the_policy_lets_in_what_is_its_own_alone(answers):
    for answer in answers.values():
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy.pop("img-src") == "'self' blob:"
        assert {"default-src", "base-uri", "form-action", "frame-ancestors"} <= {
            name for name, value in policy.items() if value == "'none'"
        }
        assert set(policy.values()) == {"'none'", "'self'"}
        assert answer.headers["referrer-policy"] == "no-referrer"


async def test_no_file_names_another_host_or_needs_what_the_policy_forbids(answers):
    for path, answer in answers.items():
        text = answer.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.findall(r"\w+:\s?//|[\"'(]//", text), path
        assert not re.findall(r"<style|<script>|\sstyle=|\son\w+=\"|@import|\burl\(", text), path
        assert not re.findall(MARKUP, text), path


async def test_addresses_are_relative_so_that_it_works_behind_a_prefix(answers):
    for path, answer in answers.items():
        assert not re.findall(r"(?:src|href|from|call\()\s*=?\s*[\"'`(]/", answer.text), path


async def test_what_the_files_import_is_there():
    for name in FILES:
        imported = re.findall(r"from \"\./([\w.]+)\"", (FOLDER / name).read_text()) if name.endswith(".js") else []
        assert set(imported) <= set(FILES), name
    assert set(re.findall(r"page/([\w.]+)\"", (FOLDER / "index.html").read_text())) <= set(FILES)


async def test_head_has_the_headers_of_get(models):
    async with serving(models) as service:
        for path in PATHS:
            head, get = await service.request("HEAD", path), await service.get(path)
            for name in ("content-type", "content-length", "etag", "content-security-policy"):
                assert head.headers[name] == get.headers[name]


async def test_a_browser_that_has_it_is_told_so(models):
    async with serving(models) as service:
        tag = (await service.get("/page/main.js")).headers["etag"]
        for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            answer = await service.get("/page/main.js", headers={"If-None-Match": given})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
            assert answer.headers["cache-control"] == "no-cache"
        assert (await service.get("/page/main.js", headers={"If-None-Match": '"other"'})).status_code == 200


@pytest.mark.parametrize("path", ["/page/none.js", "/page/index.html", "/page/..%2Fmain.py", "/page/%00", "/page/"])
async def test_nothing_else_is_served(models, path):
    async with serving(models) as service:
        refused(await service.get(path), 404, "not_found")


async def test_it_needs_no_key_and_holds_none(models):
    async with serving(models, api_keys="secret-k", admin_key="secret-a") as service:
        for path in PATHS:
            answer = await service.get(path)
            assert answer.status_code == 200
            assert "secret-" not in answer.text
        refused(await service.get("/models"), 401, "unauthorized")


def test_the_package_has_them():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'package-data\.app = \[.*"page/\*".*\]', text)
