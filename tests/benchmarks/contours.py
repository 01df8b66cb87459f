"""Contours on phantoms: Dice, HD95 and seconds of each way to draw them, from the posteriors of the naming rules.

``lungseg phantom --format store --preset small --seed 300 -n 2 -o STORE``, then
``python tests/benchmarks/contours.py STORE --cells 4 8 --fusions none sobel guided``. References only score.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from pathlib import Path

import numpy as np

from lungseg.evaluation.overlap import dice
from lungseg.evaluation.surface import hd95_mm
from lungseg.segmentation.contours import ContourSettings, contours
from lungseg.segmentation.evidence import cell_evidence
from lungseg.segmentation.sobel_fusion import remove_small_components
from lungseg.stages.case_maps import on_full_grid, source_labels
from lungseg.store.cases import Store
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, Tissue

MINIMUM_REFERENCE_ML = 1.0


def rule_posterior(volume_hu: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, ...], cell: int) -> np.ndarray:
    """Posterior of the naming rules on a lattice."""
    return cell_evidence(volume_hu, mask, cell=cell, spacing_mm=spacing_mm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--cells", type=int, nargs="+", default=[4])
    parser.add_argument("--fusions", nargs="+", default=["none", "sobel", "guided"])
    parser.add_argument("--rim-mm", type=float, nargs="+", default=[0.0, 8.0])
    options = parser.parse_args()
    store = Store(options.store)
    titles = " ".join(f"{TISSUES[tissue].name:>13}" for tissue in MIXTURE_TISSUES)
    print(f"{'case cell fusion rim':36} {titles} (Dice %/HD95 mm), healthy called diseased, CPU s")
    for case_id, cell in itertools.product(store.require_cases(), options.cells):
        with store.open(case_id, "volume") as volume, store.open(case_id, "reference") as file:
            image, mask, reference = volume.read("image"), volume.read("mask") > 0, file.read("labels")
            spacing = tuple(volume.provenance["grid"]["spacing_mm"])
            posterior = rule_posterior(image, mask, spacing, cell)
            for fusion, rim_mm in itertools.product(options.fusions, options.rim_mm):
                start = time.process_time()
                settings = ContourSettings(method=fusion, rim_mm=rim_mm)
                drawn = contours(posterior, image, mask, token_size=cell, spacing_mm=spacing, settings=settings)
                labels = remove_small_components(drawn.labels, None, voxel_ml=float(np.prod(spacing)) / 1000)
                seconds = time.process_time() - start
                moved, grid = on_full_grid(volume, source_labels(volume, labels)[0])
                cells = []
                for tissue in MIXTURE_TISSUES:
                    own, true = moved == tissue, reference == tissue
                    if np.count_nonzero(true) * np.prod(grid.spacing_mm) < 1000 * MINIMUM_REFERENCE_ML:
                        cells.append(f"{'':>13}")
                        continue
                    distance = hd95_mm(own, true, spacing_mm=grid.spacing_mm) if own.any() else np.nan
                    cells.append(f"{100 * dice(own, true):6.1f}/{distance:6.1f}")
                false = np.mean(moved[(reference == Tissue.HEALTHY) & (moved > 0)] != Tissue.HEALTHY)
                row = f"{case_id} {cell} {fusion} {rim_mm:g}"
                print(f"{row:36} {' '.join(cells)} {100 * false:6.2f} % {seconds:5.0f}", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
