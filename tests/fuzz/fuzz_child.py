"""The process that reads mutants, under a limit of memory: numbers come in on stdin, verdicts go out as JSON lines.

It is told what to do and is expected to die on a bad day: its parent knows which mutant was in hand.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import fuzz_dicom
import fuzz_images
from fuzz_judge import judge
from fuzz_mutant import Mutant

from lungseg.errors import LungsegError

MEMORY_BYTES = 3 << 30
"""Address space of the child: interpreter and libraries take about 1 GiB, a healthy scan of the fuzz a few MiB."""


def make_mutant(number: int, seed: int) -> Mutant:
    """DICOM for even, image for odd numbers: half of the number counts."""
    module = fuzz_images if number % 2 else fuzz_dicom
    return module.make_mutant(seed, number // 2)


def read_and_judge(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """Write the files, read them as preprocess does, and judge whatever comes."""
    from lungseg.scan.nifti import read_image
    from lungseg.scan.sources import find_sources

    for name, data in mutant.files.items():
        (folder / name).write_bytes(data)
    try:
        if mutant.kind.startswith("image: "):
            return judge(read_image(folder / next(iter(mutant.files))), mutant.expect)
        verdicts = []
        for source in find_sources([folder]):
            try:
                verdicts.append(judge(source.read(), mutant.expect, source.others))
            except LungsegError as error:
                verdicts.append(("refused", str(error)))
        read = [verdict for verdict in verdicts if verdict[0] != "refused"]
        bad = [verdict for verdict in read if verdict[0] == "wrong"]
        if len(read) > 1 and not bad:
            return "wrong", f"{len(read)} volumes of one scan"
        return (bad or read or verdicts or [("wrong", "no source")])[0]
    except LungsegError as error:
        return "refused", str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/lungseg/" in f.filename]
        at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        there = f"{Path(last.filename).name}:{last.lineno}"
        return "exception", f"{type(error).__name__}: {str(error)[:200]} at {at} ({there})"


def main() -> None:
    """Read numbers until there are no more."""
    warnings.simplefilter("ignore")
    seed = int(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    make_mutant(0, seed)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        number = int(line)
        mutant = make_mutant(number, seed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            verdict, reason = read_and_judge(mutant, Path(folder))
        answer = {
            "number": number, "kind": mutant.kind, "base": mutant.base, "detail": mutant.detail, "verdict": verdict,
            "reason": reason.replace(folder, "FOLDER"), "seconds": time.monotonic() - begin,
            "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        }  # fmt: skip
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
