"""Coverage-guided fuzzing of one reader: python -m tests.fuzz.guided TARGET SECONDS FOLDER. Needs the extra `fuzz`.

What reaches new code is kept in FOLDER/corpus; the file that breaks the reader in FOLDER, and the status is not 0.
"""

import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["app", "zipfile"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutation import mutated
from tests.fuzz.seeds import kept

LONGEST = 1 << 16
"""Bytes of a file."""


def _mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Part by part as often as byte by byte."""
    random = Random(seed)
    found = mutated(random, data) if random.random() < 0.5 else atheris.Mutate(data, longest)
    return bytes(found[:longest])


def main(name: str, seconds: str, folder: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    target = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, body in enumerate([*target.seeds(), *kept(name)]):
        (corpus / f"seed-{index:03}").write_bytes(body)
    limits = ["-rss_limit_mb=1024", "-timeout=20", f"-max_len={LONGEST}", f"-max_total_time={seconds}"]
    arguments = [sys.argv[0], *limits, f"-artifact_prefix={folder}/", "-print_final_stats=1", str(corpus)]
    atheris.Setup(arguments, lambda data: target.try_on(data) and None, custom_mutator=_mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
