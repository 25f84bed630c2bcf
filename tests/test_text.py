from app.text import one_line, reason, short, shown


def test_one_line_is_one_line_of_utf_8_and_plain_text_stays():
    assert one_line("größe: 3 × 4") == "größe: 3 × 4"
    assert one_line("a\r\nb\0\ud800\u2028c") == "a\\r\\nb\\x00\\ud800\\u2028c"


def test_shown_carries_bytes_that_are_no_utf_8():
    assert shown("\udcffx") == "\\xffx"
    shown("\udcffx").encode()


def test_short_is_one_line_and_not_endless():
    assert short("a\nb") == "a\\nb"
    assert len(short("x" * 10_000_000)) == 100


def test_a_reason_is_one_line_and_never_empty():
    assert reason(ValueError("a\n  b")) == "a b"
    assert reason(ValueError()) == "ValueError"
