"""Peak memory and time of ``lungseg preprocess`` on a large scan: 600 slices of 512 x 512 (issue: under 4 GiB).

Run: ``python tests/benchmarks/preprocess_memory.py [--slices 600] [--spacing 0.6 1.0]``. A digital phantom of
0.6 x 0.7 x 0.7 mm is written as uncompressed DICOM (needs 320 MB of temporary disk) and read by a process of its own
per spacing. Peak memory is the high-water mark of the process that reads (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SPACING_MM = (0.6, 0.7, 0.7)
COARSE_MM = (1.8, 1.4, 1.4)
SIZE = 512
LIMIT_GIB = 4.0


def write_scan(folder: Path, slices: int) -> None:
    """The phantom, made at a coarser grid and brought to the fine one."""
    from lungseg.scan.dicom import write_dicom_series
    from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom
    from lungseg.scan.resample import resample_to_spacing
    from lungseg.scan.volume import Volume

    extent = (slices * SPACING_MM[0], SIZE * SPACING_MM[1], SIZE * SPACING_MM[2])
    made = make_phantom(PhantomSpec(extent, COARSE_MM, "moderate", DISEASES), seed=901)
    array, geometry = resample_to_spacing(made.volume_hu, made.geometry, SPACING_MM, kind="ct")
    # the noise of the fine grid, which interpolation has smoothed away: compression and lungs should work as hard
    rng = np.random.default_rng(1)
    for k in range(len(array)):
        array[k] = (array[k] + rng.normal(0, 20, array[k].shape)).clip(-1024, 3000)
    write_dicom_series(folder, Volume(array, geometry), patient_id="large", series_seed="large", compress=False)


def run_one(scan: Path, output: Path, spacing: float) -> dict[str, float]:
    """Preprocess in this process."""
    from lungseg.config import Execution, PreprocessConfig
    from lungseg.stages.preprocess import preprocess

    begin = time.perf_counter(), time.process_time()
    preprocess(scan, output, PreprocessConfig(spacing_mm=spacing), execution=Execution(quiet=True)).require_complete()
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    status = Path("/proc/self/status").read_text(encoding="ascii")
    written = sum(path.stat().st_size for path in output.rglob("*.h5"))
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return {"wall": wall, "cpu": cpu, "peak_gib": peak, "written_gib": written / 2**30}


def main() -> int:
    """Print a Markdown table; 1 if a process needs more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--spacing", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--one", nargs=3, metavar=("SCAN", "OUTPUT", "SPACING"))
    parser.add_argument("--write", type=Path, metavar="SCAN")
    options = parser.parse_args()
    if options.write:
        write_scan(options.write, options.slices)
        return 0
    if options.one:
        print(json.dumps(run_one(Path(options.one[0]), Path(options.one[1]), float(options.one[2]))))
        return 0
    if not Path("/proc/self/status").exists():
        print("peak memory is measured on Linux only")
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as work:
        scan = Path(work) / "scan"
        write = [sys.executable, __file__, "--write", str(scan), "--slices", str(options.slices)]
        subprocess.run(write, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        array_gib = options.slices * SIZE * SIZE * 2 / 2**30
        voxel = " x ".join(f"{s:g}" for s in SPACING_MM)
        print(f"{options.slices} x {SIZE} x {SIZE} at {voxel} mm, {array_gib:.2f} GiB as int16\n")
        print("| spacing mm | wall s | CPU s | peak GiB | peak / array | written GiB |\n|---|---|---|---|---|---|")
        for spacing in options.spacing:
            command = [sys.executable, __file__, "--one", str(scan), str(Path(work) / f"out-{spacing}"), str(spacing)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            r = json.loads(done.stdout.splitlines()[-1])
            worst = max(worst, r["peak_gib"])
            cells = f"{r['wall']:.0f} | {r['cpu']:.0f} | {r['peak_gib']:.2f} | {r['peak_gib'] / array_gib:.1f}"
            print(f"| {spacing:g} | {cells} | {r['written_gib']:.2f} |", flush=True)
    print(f"\nlimit {LIMIT_GIB:g} GiB: {'kept' if worst <= LIMIT_GIB else 'EXCEEDED'}")
    return 0 if worst <= LIMIT_GIB else 1


if __name__ == "__main__":
    sys.exit(main())
