"""Checks of lung masks: what a mask that fits, and one that was moved, look like to them; and what they cost.

Run: ``python tests/benchmarks/lung_masks.py [--shared-data DIR]``. Prints the table of ``RESULTS.md`` as Markdown.
Masks: the true lungs of phantoms; masks that come with real scans; our own lungs where there is none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lungseg.config import PhantomConfig
from lungseg.scan.lung_mask_checks import AERATED_HU, SHELL_MM, aerated_beside
from lungseg.scan.lung_mask_sides import airway_of
from lungseg.scan.lung_masks import lungs_from_mask
from lungseg.scan.lungs import COARSE_MM, find_lungs
from lungseg.scan.lungs_grid import coarsen
from lungseg.scan.nifti import read_image
from lungseg.scan.phantom import make_phantom
from lungseg.scan.sources import find_sources
from lungseg.scan.volume import Volume
from lungseg.stages.phantom import as_volume, phantom_spec

ROOT = Path(__file__).resolve().parents[2]
PHANTOMS = (("healthy", 9000), ("moderate", 9001), ("severe", 9002), ("severe", 9003))
MOVES_MM = ((0, 0, 0), (10, 0, 0), (0, 10, 0), (0, 0, 10), (20, 0, 0), (0, 20, 0), (0, 0, 20))
"""Along z, y and x."""


def cases(shared: Path) -> Iterator[tuple[str, Volume, np.ndarray]]:
    """Name, scan and side labels of each case."""
    for severity, seed in PHANTOMS:
        spec = phantom_spec(PhantomConfig(severity=severity, spacing_mm=(2.5, 1.5, 1.5)), seed)
        made = make_phantom(spec, seed=seed)
        yield f"phantom {seed}, {severity}", as_volume(made, spec), made.lungs
    if not shared.is_dir():
        print(f"no real CT at {shared}: phantoms only\n")
        return
    for name, scan, mask in (
        ("cip-small, its mask", "cip-small/ct-64.nrrd", "cip-small/wholeLung-64.nrrd"),
        ("elastix-emphysema, its mask", "elastix-emphysema/ct.mha", "elastix-emphysema/right_lung_mask.mha"),
    ):
        yield name, read_image(shared / scan), read_image(shared / mask, integer=True).array
    for folder in ("covid-p002/dicom", "lungdx-a0002/dicom"):
        scan = find_sources([shared / folder])[0].read()
        labels = find_lungs(scan.array, scan.geometry.spacing_mm).labels
        yield f"{folder.split('/')[0]}, our lungs", scan, labels


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared-data", type=Path, default=ROOT.parent / "shared" / "data")
    shared = parser.parse_args().shared_data
    low, high = AERATED_HU
    print(f"Share of {low:.0f} to {high:.0f} HU at {SHELL_MM[0]:g} to {SHELL_MM[1]:g} mm outside of the mask, in %.\n")
    moves = [f"moved {z}, {y}, {x} mm" for z, y, x in MOVES_MM]
    print("| " + " | ".join(("scan", "voxels", "mean HU", *moves, "check s", "find_lungs s")) + " |")
    print("|---" * (len(MOVES_MM) + 5) + "|")
    for name, scan, labels in cases(shared):
        spacing = scan.geometry.spacing_mm
        hu, coarse_mm = coarsen(scan.array, spacing, COARSE_MM)
        airway = airway_of(hu, coarse_mm)
        shares = []
        for move_mm in MOVES_MM:
            steps = [round(mm / s) for mm, s in zip(move_mm, spacing, strict=True)]
            moved = np.roll(labels > 0, steps, axis=(0, 1, 2))
            mask = coarsen(moved, spacing, COARSE_MM)[0] >= 0.5
            shares.append(f"{100.0 * aerated_beside(mask, hu, airway, coarse_mm):.1f}")
        begin = time.process_time()
        found = lungs_from_mask(Volume(labels, scan.geometry), scan)
        check_s = time.process_time() - begin
        begin = time.process_time()
        find_lungs(scan.array, spacing)
        own_s = time.process_time() - begin
        size = "x".join(map(str, scan.array.shape))
        row = (name, size, f"{found.field.mean_hu:.0f}", *shares, f"{check_s:.1f}", f"{own_s:.1f}")
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
