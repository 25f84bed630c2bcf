import re
from base64 import b64encode
from hashlib import sha256

import pytest

from app.main import create_app
from app.settings import Settings
from tests.service import refused, serving


@pytest.fixture
async def page(models):
    async with serving(models) as service:
        return await service.get("/docs")


async def test_the_document_is_served(models):
    async with serving(models) as service:
        answer = await service.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == create_app(Settings(models=models, device="cpu")).openapi()


async def test_the_page_names_no_other_host(page):
    assert page.headers["content-type"].startswith("text/html")
    assert 'fetch("openapi.json"' in page.text
    assert "//" not in page.text
    assert not re.findall(r"<(?:link|img|iframe|base)\b|<script [^>]*src|@import|url\(", page.text)


async def test_its_policy_lets_in_what_is_its_own_alone(page):
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        ((content),) = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page.text)
        assert policy[f"{tag}-src"] == f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"


async def test_the_page_writes_text_and_no_markup(page):
    """What the document says, and what an answer says, is never read as HTML."""
    assert not re.findall("javascript:|innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", page.text)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_keys_guard_both(models, path):
    async with serving(models, api_keys="k") as service:
        refused(await service.get(path), 401, "unauthorized")
        assert (await service.get(path, headers={"Authorization": "Bearer k"})).status_code == 200
