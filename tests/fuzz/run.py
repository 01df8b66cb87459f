"""Seeded, bounded fuzz of the readers: damaged series and image files are refused or read right.

Run: ``python tests/fuzz/run.py --dicom 1000 --image 300 --seed 0``. Ends with exit code 1 if there is a defect; with
``--keep FOLDER`` the files of each defect are kept there. Mutants again: ``--only NUMBER ...`` (as printed). What is
fair is written in ``fuzz_judge.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fuzz_runner import FAIR, fuzz, keep, table


def main() -> int:
    """Run, print the table and the defects."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dicom", type=int, default=1000)
    parser.add_argument("--image", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--all", action="store_true", help="print every answer")
    parser.add_argument("--start", type=int, default=0, help="number of the first mutant of each kind of file")
    options = parser.parse_args()
    first = options.start
    dicom = [2 * (first + i) for i in range(options.dicom)]
    image = [2 * (first + i) + 1 for i in range(options.image)]
    numbers = options.only or sorted(dicom + image)
    begin = time.monotonic()
    answers = []
    for answer in fuzz(numbers, options.seed):
        answers.append(answer)
        is_defect = answer["verdict"] not in FAIR
        if is_defect or options.all or options.only:
            told = (answer[key] for key in ("number", "verdict", "kind", "base", "detail", "reason"))
            print("  ".join(str(value) for value in told), flush=True)
        if is_defect and options.keep:
            keep(options.keep, answer, options.seed)
    defects = sum(answer["verdict"] not in FAIR for answer in answers)
    slowest = max(answer["seconds"] for answer in answers)
    print(f"\n{table(answers)}\n")
    print(
        f"seed {options.seed}: {len(answers)} mutants in {time.monotonic() - begin:.0f} s, slowest {slowest:.1f} s, "
        f"largest growth {max(answer['grown_mib'] for answer in answers):.0f} MiB, {defects} defects"
    )
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
