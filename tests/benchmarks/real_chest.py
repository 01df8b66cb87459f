"""``lungseg run`` on a real chest: time and peak memory of the whole process.

Run: ``python tests/benchmarks/real_chest.py [--scan DICOM_FOLDER] [--model BUNDLE] [--keep DIR]``. Without ``--model``
the bundle of ``make demo`` is used.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Print wall and CPU time and peak memory of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scan", type=Path, default=ROOT.parent / "shared" / "data" / "covid-p002" / "dicom")
    parser.add_argument("--model", type=Path, default=ROOT / "demo-output" / "bundle.safetensors")
    parser.add_argument("--keep", type=Path, help="keep the output here")
    arguments = parser.parse_args()
    if not arguments.scan.is_dir() or not arguments.model.is_file():
        print(f"real_chest: skipped, {arguments.scan} or {arguments.model} is missing")
        return
    with tempfile.TemporaryDirectory() as folder:
        output = arguments.keep or Path(folder) / "out"
        begin = time.monotonic()
        command = [sys.executable, "-m", "lungseg.cli.app", "run", str(arguments.scan), "-o", str(output)]
        subprocess.run([*command, "--model", str(arguments.model)], check=True)
        wall = time.monotonic() - begin
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = usage.ru_utime + usage.ru_stime
    print(f"| {arguments.scan.parent.name} | {wall:.0f} s | {cpu:.0f} s | {usage.ru_maxrss / 2**20:.2f} GiB |")


if __name__ == "__main__":
    main()
