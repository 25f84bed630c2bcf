import time

from app.tools.progress import Progress


def test_without_a_terminal_it_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(1000, "picture") as shown:
        for _ in range(100):
            now[0] += 0.11
            shown.step()
        shown.say("a word")
    assert capsys.readouterr().err.splitlines() == [
        "latentd: 46 of 1000, 9.1 pictures/s, 01:45 left",
        "latentd: 92 of 1000, 9.1 pictures/s, 01:40 left",
        "latentd: a word",
    ]
