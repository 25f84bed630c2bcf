import pytest

from app.api.answer import negotiate
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
    ],
)
def test_takes_the_offer_of_the_highest_weight(accept, chosen):
    assert negotiate(accept, OFFERS) == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "*/*;q=0", "image/png;q=inf", "image", ";;;", "=,q"])
def test_names_the_offers_when_none_is_accepted(accept):
    with pytest.raises(NotAcceptable, match="image/png, image/jpeg, application/x-npy"):
        negotiate(accept, OFFERS)
