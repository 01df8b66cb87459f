"""How hard the digital phantom is: HU of its classes, thresholds, separability of pairs, and what one costs.

Run: ``python tests/benchmarks/phantom_hardness.py [--seeds 500 501 502] [--small]``. Prints markdown for RESULTS.md.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
from scipy import ndimage, stats

from lungseg.scan.phantom import DISEASES, Phantom, PhantomSpec, make_phantom
from lungseg.tissue import TISSUES, Tissue

FULL_SIZE = PhantomSpec(
    extent_mm=(325.0, 260.0, 332.8), spacing_mm=(1.3, 1.3, 1.3), severity="moderate", diseases=DISEASES
)
"""250 x 200 x 256 voxels (z, y, x)."""
CUTS_HU = (-950.0, -750.0, -500.0, -200.0)
ORDER = (Tissue.EMPHYSEMA, Tissue.HEALTHY, Tissue.GGO, Tissue.FIBROSIS, Tissue.CONSOLIDATION)
NEIGHBOURS = (
    (Tissue.HEALTHY, Tissue.EMPHYSEMA),
    (Tissue.HEALTHY, Tissue.GGO),
    (Tissue.GGO, Tissue.FIBROSIS),
    (Tissue.FIBROSIS, Tissue.CONSOLIDATION),
)
"""Pairs that must not be separable (issue 4)."""
MAX_AUC = 0.97
WINDOW_MM = 5.0
SAMPLES = 20_000
"""Voxels of each class and phantom that an AUC is computed from."""


def threshold_scores(phantom: Phantom) -> dict[Tissue, float]:
    """DSC of each class when every lung voxel is named by the cut points alone."""
    lung = phantom.labels > 0
    scores = {}
    for tissue, (low, high) in zip(ORDER, pairwise((-np.inf, *CUTS_HU, np.inf)), strict=True):
        guess = lung & (phantom.volume_hu >= low) & (phantom.volume_hu < high)
        truth = phantom.labels == tissue
        scores[tissue] = 2.0 * float((guess & truth).sum()) / float(guess.sum() + truth.sum())
    return scores


def features(phantom: Phantom) -> dict[str, np.ndarray]:
    """Voxel value, and mean and standard deviation of a window of ``WINDOW_MM`` around each voxel."""
    volume = phantom.volume_hu.astype(np.float32)
    size = [max(1, round(WINDOW_MM / s)) for s in phantom.geometry.spacing_mm]
    mean = ndimage.uniform_filter(volume, size)
    spread = np.sqrt(np.maximum(ndimage.uniform_filter(volume**2, size) - mean**2, 0.0))
    return {"voxel": volume, "mean": mean, "SD": spread}


def sample_features(phantoms: Sequence[Phantom]) -> dict[Tissue, dict[str, np.ndarray]]:
    """Values of the features at random voxels of each class, all phantoms together."""
    parts: dict[Tissue, dict[str, list[np.ndarray]]] = {t: {} for t in ORDER}
    for phantom in phantoms:
        rng = np.random.default_rng(0)
        images = features(phantom)
        for tissue in ORDER:
            index = np.flatnonzero(phantom.labels == tissue)
            index = index[rng.integers(len(index), size=min(SAMPLES, len(index)))] if len(index) else index
            for name, image in images.items():
                parts[tissue].setdefault(name, []).append(image.ravel()[index])
    return {t: {name: np.concatenate(values) for name, values in part.items()} for t, part in parts.items()}


def auc(first: np.ndarray, second: np.ndarray) -> float:
    """Area under the ROC curve of one feature, whichever way round it separates better."""
    area = float(stats.mannwhitneyu(first, second).statistic) / (len(first) * len(second))
    return max(area, 1.0 - area)


def pair_table(samples: dict[Tissue, dict[str, np.ndarray]]) -> dict[tuple[Tissue, Tissue], dict[str, float]]:
    """AUC of every pair of classes by each feature."""
    return {
        (a, b): {name: auc(samples[a][name], samples[b][name]) for name in samples[a]}
        for a, b in combinations(sorted(ORDER), 2)
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[500, 501, 502])
    parser.add_argument("--small", action="store_true", help="phantoms of the size of data_samples")
    arguments = parser.parse_args()
    small = PhantomSpec(spacing_mm=(1.5, 1.25, 1.25), severity="moderate", diseases=DISEASES)
    spec = small if arguments.small else FULL_SIZE
    phantoms, seconds = [], []
    for seed in arguments.seeds:
        begin = time.process_time()
        phantoms.append(make_phantom(spec, seed=seed))
        seconds.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    shape = "x".join(str(n) for n in phantoms[0].volume_hu.shape)
    words = ", ".join(f"{s:.1f}" for s in seconds)
    print(f"{shape}, seeds {arguments.seeds}: {words} s of CPU, peak {peak:.2f} GiB\n")
    print("| class | HU mean ± SD | share of lung % | DSC of thresholds % |\n|---|---|---|---|")
    scores = [threshold_scores(phantom) for phantom in phantoms]
    lung = sum(int((p.labels > 0).sum()) for p in phantoms)
    for tissue in ORDER:
        values = np.concatenate([p.volume_hu[p.labels == tissue] for p in phantoms]).astype(np.float64)
        dice = 100.0 * float(np.mean([score[tissue] for score in scores]))
        share = 100.0 * len(values) / lung
        print(f"| {TISSUES[tissue].name} | {values.mean():.0f} ± {values.std():.0f} | {share:.1f} | {dice:.1f} |")
    mean = 100.0 * float(np.mean([list(score.values()) for score in scores]))
    print(f"| mean of five | | | **{mean:.1f}** |\n")
    print("| pair | AUC voxel | AUC mean of 5 mm | AUC SD of 5 mm |\n|---|---|---|---|")
    for (a, b), row in pair_table(sample_features(phantoms)).items():
        mark = "**" if (a, b) in NEIGHBOURS else ""
        cells = " | ".join(f"{value:.3f}{' !' if mark and value > MAX_AUC else ''}" for value in row.values())
        print(f"| {mark}{TISSUES[a].name} – {TISSUES[b].name}{mark} | {cells} |")


if __name__ == "__main__":
    main()
