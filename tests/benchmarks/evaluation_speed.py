"""Time and memory of scoring one large pair of label maps, against MONAI and surface-distance.

Run: ``python tests/benchmarks/evaluation_speed.py [--shape 400 512 512] [--repeats 3]``. Two lungs with five classes
are made from a seed; the prediction is the same anatomy with disturbed borders, missing and false islands (`smooth`),
or the same with 2 % of the lung's voxels speckled, as voxelwise thresholds do (`speckled`). Each tool scores the pair
in a process of its own, from the two uint8 label maps in memory to one HD95 a class; "all figures" are a table's.
Peak memory is the high-water mark of the process (Linux), the two maps (200 MiB) and the imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SPACING_MM = (0.75, 0.7, 0.7)
CLASSES = ("healthy", "emphysema", "ggo", "fibrosis", "consolidation")
SHARES = {2: 0.12, 3: 0.12, 4: 0.10, 5: 0.05}
"""Share of the lung that each disease takes of what is left, by label id."""
SAME_WORK = "lungseg (HD95 only)"
"""What is held against the target: the rows with all figures do more work than the others and are only shown."""
TARGET_SPEEDUP = 3.0
LIMIT_GIB = 3.0
EQUAL = 1e-5
"""Values are equal within this, relative above 1 mm (the issue)."""
COARSE = 8
"""Fields are drawn on a grid this much coarser and interpolated."""


def make_pair(shape: tuple[int, int, int], seed: int, *, speckled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference, uint8."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    grid = [np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if i == k else 1 for i in range(3)]) for k, n in
            enumerate(shape)]  # fmt: skip
    lungs = np.zeros(shape, dtype=bool)
    for side in (-0.42, 0.42):
        lungs |= (grid[0] / 0.85) ** 2 + (grid[1] / 0.62) ** 2 + ((grid[2] - side) / 0.36) ** 2 < 1

    def field(sigma: float) -> np.ndarray:
        """Smooth random field over the lung, standard normal at any voxel."""
        coarse = ndimage.gaussian_filter(rng.standard_normal([n // COARSE + 2 for n in shape]), sigma)
        coarse = (coarse / coarse.std()).astype(np.float32)
        zoom = [n / m for n, m in zip(shape, coarse.shape, strict=True)]
        return ndimage.zoom(coarse, zoom, order=1)[lungs]

    maps = [np.ones(int(lungs.sum()), dtype=np.uint8) for _ in range(2)]
    for label, share in SHARES.items():
        anatomy, blur = field(3.0), field(1.0)
        for target, disturbed in ((maps[1], anatomy), (maps[0], anatomy + 0.2 * blur)):
            target[disturbed > np.quantile(anatomy, 1 - share)] = label
    if speckled:
        hit = rng.random(maps[0].size) < 0.02
        maps[0][hit] = rng.integers(1, 6, int(hit.sum()), dtype=np.uint8)
    pair = [np.zeros(shape, dtype=np.uint8) for _ in range(2)]
    for target, values in zip(pair, maps, strict=True):
        target[lungs] = values
    return pair[0], pair[1]


def score_ours(prediction: np.ndarray, reference: np.ndarray, hd95: str) -> list[float]:
    """Every figure of a table (overlap, HD95, ASSD, surface Dice); returned is the HD95 of each class."""
    from lungseg.evaluation.overlap import score_case
    from lungseg.evaluation.scores import ScoreSettings
    from lungseg.tissue import VIEWS

    scores = score_case(
        prediction, reference, spacing_mm=SPACING_MM, view=VIEWS["tissues"], case_id="c", patient_id="p",
        settings=ScoreSettings(hd95=hd95),
    )  # fmt: skip
    return [score.hd95_mm for score in scores]


def score_our_hd95(prediction: np.ndarray, reference: np.ndarray) -> list[float]:
    """The same work as ``score_monai``: nothing but the HD95."""
    from lungseg.evaluation.surface import hd95_mm

    labels = range(1, len(CLASSES) + 1)
    return [hd95_mm(prediction == label, reference == label, spacing_mm=SPACING_MM) for label in labels]


def score_monai(prediction: np.ndarray, reference: np.ndarray) -> list[float]:
    """HD95 only, class by class (one-hot of all five at once would need 4 GB)."""
    import torch
    from monai.metrics import compute_hausdorff_distance

    values = []
    for label in range(1, len(CLASSES) + 1):
        masks = [torch.from_numpy(labels == label)[None, None] for labels in (prediction, reference)]
        values.append(compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=SPACING_MM))
    return [float(value) for value in values]


def score_surface_distance(prediction: np.ndarray, reference: np.ndarray) -> list[float]:
    """Its HD95 only."""
    import surface_distance

    values = []
    for label in range(1, len(CLASSES) + 1):
        found = surface_distance.compute_surface_distances(reference == label, prediction == label, SPACING_MM)
        values.append(float(surface_distance.compute_robust_hausdorff(found, 95)))
    return values


TOOLS: dict[str, Callable[[np.ndarray, np.ndarray], list[float]]] = {
    "lungseg (all figures, HD95 border)": lambda prediction, reference: score_ours(prediction, reference, "border"),
    SAME_WORK: score_our_hd95,
    "MONAI (HD95 only)": score_monai,
    "lungseg (all figures, HD95 surface)": lambda prediction, reference: score_ours(prediction, reference, "surface"),
    "surface-distance (HD95 only)": score_surface_distance,
}
EQUAL_PAIRS = (
    (SAME_WORK, "MONAI (HD95 only)"),
    ("lungseg (all figures, HD95 border)", "MONAI (HD95 only)"),
    ("lungseg (all figures, HD95 surface)", "surface-distance (HD95 only)"),
)


def run_one(tool: str, pair: Path) -> dict[str, object]:
    """Score in this process, after a warm-up on a small pair (imports, tables)."""
    with np.load(pair) as stored:
        prediction, reference = stored["prediction"], stored["reference"]
    TOOLS[tool](*np.random.default_rng(0).integers(1, 6, size=(2, 30, 30, 30), dtype=np.uint8))
    begin = time.perf_counter(), time.process_time()
    values = TOOLS[tool](prediction, reference)
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {"wall": wall, "cpu": cpu, "peak_gib": int(status.split("VmHWM:")[1].split()[0]) / 2**20, "hd95": values}


def compare(kind: str, found: dict[str, dict[str, object]]) -> list[str]:
    """Print the table of one pair; what misses a target is returned."""
    print(f"| {kind} pair | wall s | CPU s | peak GiB | HD95 mm ({', '.join(CLASSES)}) |\n|---|---|---|---|---|")
    for tool, row in found.items():
        values = ", ".join(f"{value:.4f}" for value in row["hd95"])
        print(f"| {tool} | {row['wall']:.1f} | {row['cpu']:.1f} | {row['peak_gib']:.2f} | {values} |")
    problems = []
    faster = min(float(row["cpu"]) for tool, row in found.items() if not tool.startswith("lungseg"))
    for tool in [tool for tool in found if tool.startswith("lungseg")]:
        speedup = faster / float(found[tool]["cpu"])
        print(f"\n{tool}: {speedup:.1f} times as fast (CPU) as the faster of the others", end="")
        if tool == SAME_WORK and speedup < TARGET_SPEEDUP:
            problems.append(f"{kind}: {tool} is only {speedup:.1f} times as fast")
        if float(found[tool]["peak_gib"]) > LIMIT_GIB:
            problems.append(f"{kind}: {tool} needs {found[tool]['peak_gib']:.2f} GiB")
    for ours, theirs in EQUAL_PAIRS:
        if ours in found and theirs in found:
            pairs = np.array([found[ours]["hd95"], found[theirs]["hd95"]])
            gap = float(np.max(np.abs(pairs[0] - pairs[1]) / np.maximum(1, pairs[1])))
            print(f"\n{ours} and {theirs} differ by at most {gap:.1e}", end="")
            if not gap <= EQUAL:
                problems.append(f"{kind}: {ours} and {theirs} differ by {gap:.1e}")
    print("\n")
    return problems


def main() -> int:
    """Print Markdown tables; 1 if a value differs, or time or memory miss their target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=[400, 512, 512])
    parser.add_argument("--repeats", type=int, default=1, help="the fastest run of each tool counts")
    parser.add_argument("--kinds", nargs="+", choices=("smooth", "speckled"), default=["smooth", "speckled"])
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "PAIR"))
    parser.add_argument("--write", nargs=2, metavar=("KIND", "PAIR"))
    options = parser.parse_args()
    if options.write:
        kind, path = options.write
        prediction, reference = make_pair(tuple(options.shape), seed=1, speckled=kind == "speckled")
        np.savez(path, prediction=prediction, reference=reference)
        return 0
    if options.one:
        print(json.dumps(run_one(options.one[0], Path(options.one[1]))))
        return 0
    if not Path("/proc/self/status").exists():
        print("peak memory is measured on Linux only")
        return 0
    problems = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    shape = [str(n) for n in options.shape]
    with tempfile.TemporaryDirectory() as work:
        for kind in options.kinds:
            pair = str(Path(work) / f"{kind}.npz")
            write = [sys.executable, __file__, "--write", kind, pair, "--shape", *shape]
            subprocess.run(write, check=True, env=environment)
            found: dict[str, dict[str, object]] = {}
            for _ in range(options.repeats):
                for tool in TOOLS:
                    done = subprocess.run(
                        [sys.executable, __file__, "--one", tool, pair], env=environment, capture_output=True, text=True
                    )
                    if done.returncode:
                        problems.append(f"{kind}: {tool} failed: {done.stderr.strip().splitlines()[-1]}")
                        continue
                    row = json.loads(done.stdout.splitlines()[-1])
                    if tool not in found or row["cpu"] < float(found[tool]["cpu"]):
                        found[tool] = row
            problems += compare(kind, found)
    print("\n".join(problems) or "every value is equal, every target is met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
