from urllib.parse import unquote

import pytest

from app.api.answer import content_type, header_value, negotiate
from app.errors import NotAcceptable

OFFERS = ("image/png", "image/jpeg", "application/x-npy")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "image/png"),
        (" , ", "image/png"),
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("application/*", "application/x-npy"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("image/jpeg;q=0.5, application/x-npy", "application/x-npy"),
        ("image/jpeg; Q=0.5 ; x=1, image/png;q=.4", "image/jpeg"),  # .4 is no weight: refused
        ("image/png;q=0, */*", "image/jpeg"),
        ("image/*;q=0.3, image/jpeg;q=0.2, */*;q=0.1", "image/png"),
        ("text/html, application/xhtml+xml, image/webp, */*;q=0.8", "image/png"),
        ("image/jpeg;level=1", "image/jpeg"),
        ("image/png;q=nan, image/jpeg;q=0.1", "image/jpeg"),
        ("image/png;q=1e9, image/jpeg;q=0.1", "image/jpeg"),
        ("application/problem+json", "image/png"),  # how errors are wanted
        ("application/json, application/problem+json;q=0.5", "image/png"),
        ("application/problem+json, image/jpeg;q=0.1", "image/jpeg"),
        ("application/octet-stream", "image/png"),
        ("application/octet-stream, image/jpeg;q=0.5", "image/jpeg"),
    ],
)
def test_takes_the_offer_of_the_highest_weight(accept, chosen):
    assert negotiate(accept, OFFERS) == chosen


def test_json_counts_where_it_is_offered():
    assert negotiate("application/json", ("image/png", "application/json")) == "application/json"
    assert negotiate("application/problem+json", ("image/png", "application/json")) == "image/png"


@pytest.mark.parametrize(
    ("accept", "called"),
    [
        ("", "image/png"),
        ("*/*", "image/png"),
        ("application/problem+json", "image/png"),
        ("application/octet-stream", "application/octet-stream"),
        ("application/octet-stream;q=0.9, image/*;q=0.5", "application/octet-stream"),
        ("application/octet-stream, */*", "image/png"),
    ],
)
def test_a_file_is_called_octets_where_that_is_preferred(accept, called):
    assert content_type(accept, negotiate(accept, OFFERS)) == called


@pytest.mark.parametrize("accept", ["text/html, application/json", "application/octet-stream;q=0"])
def test_other_types_that_cannot_be_are_still_refused(accept):
    with pytest.raises(NotAcceptable):
        negotiate(accept, OFFERS)


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "*/*;q=0", "image/png;q=inf", "image", ";;;", "=,q"])
def test_names_the_offers_when_none_is_accepted(accept):
    with pytest.raises(NotAcceptable, match="image/png, image/jpeg, application/x-npy"):
        negotiate(accept, OFFERS)


@pytest.mark.parametrize("text", ["kl", " kl", "kl  ", "  ", " ä\n%", "a b"])
def test_a_header_carries_any_text_and_no_blank_at_its_ends(text):
    value = header_value(text)
    assert value == value.strip()
    assert value.isascii()
    assert value.isprintable()
    assert unquote(value) == text
