import json
from pathlib import Path

from app.tools.manifest import Maker
from app.tools.paths import Item
from app.tools.summary import Tally


def test_a_line_and_an_object():
    tally = Tally(5, {".gif": 2})
    assert not tally.any
    assert json.loads(tally.json()) | {"seconds": 0} == {
        "op": None,
        "model": None,
        "options": {},
        "total": 5,
        "done": 0,
        "skipped": 0,
        "failed": [],
        "not_read": {".gif": 2},
        "buckets": {},
        "warnings": [],
        "ended": None,
        "seconds": 0,
        "files_per_second": 0,
    }
    tally.maker = Maker("encode", "kl", "ab", "sd1", "config", {"flip": True})
    tally.done.append(Item(Path("a"), Path("b")))
    tally.failed.append(("c.png", "it is torn"))
    tally.skipped = 2
    tally.sizes[64, 96] += 1
    assert tally.line() == "1 done, 1 failed, 2 skipped; not read: 2 .gif"
    told = json.loads(tally.json())
    assert (told["op"], told["model"], told["sha256"], told["family"]) == ("encode", "kl", "ab", "sd1")
    assert told["failed"] == [{"file": "c.png", "reason": "it is torn"}]
    assert (told["done"], told["skipped"], told["buckets"], told["options"]) == (1, 2, {"64x96": 1}, {"flip": True})
