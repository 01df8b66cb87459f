"""What label maps say of real scans of which something is known: densities, infected slices, two kernels of one scan.

Run: ``python tests/benchmarks/real_scans_accuracy.py --shared-data DIR --work DIR [--method rules]``. Stores are
made under ``--work`` and kept. ``--method`` is ``rules`` (what ``lungseg run`` does without a model: ``cluster`` and
``refine`` with their defaults, maps and pictures exported to ``--work``/results), ``evidence`` (the same evidence
without the contours of ``refine``), ``hu-thresholds`` (literature cuts, median-filtered), or the name of a run whose
``labels.<name>.h5`` lie in those stores. Prints markdown. Labels of the data set are only compared with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.ndimage import median_filter
from sklearn.metrics import roc_auc_score

from lungseg.evaluation.overlap import dice
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry
from lungseg.segmentation.density import smooth_hu
from lungseg.segmentation.evidence import SMOOTHING_MM, dense_statistics, evidence_posterior, tissue_probabilities
from lungseg.segmentation.lattice import fill_uncovered
from lungseg.segmentation.sobel_fusion import posterior_labels, remove_small_components
from lungseg.store.cases import Store
from lungseg.tissue import (
    CONSOLIDATION_MEDIAN_HU,
    HEALTHY_MEDIAN_HU,
    LAA950_HU,
    LAA_HU,
    MIXTURE_TISSUES,
    TISSUES,
    Tissue,
)

CELL_MM = 2.0
KERNELS = ("B40f", "B70f")
COMMON_SHARE = 0.05
"""A class counts in the comparison of kernels from this share of the lung in both (issue 9)."""
DEFAULT_METHOD = "rules"
"""What ``lungseg run`` does without a model."""
FIBROSIS_HU = -500.0
"""Thresholds alone: ground glass below, fibrosis above (FEASIBILITY)."""


@dataclass(frozen=True)
class Scan:
    """A scan on its working grid."""

    hu: np.ndarray
    lung: np.ndarray
    spacing_mm: tuple[float, float, float]
    grid: Geometry
    labels: np.ndarray


def read_scan(place: Path, method: str) -> Scan:
    """The one case of a store, with the label map of the method."""
    store = Store(place)
    (case_id,) = store.require_cases()
    with store.open(case_id, "volume") as volume:
        hu, lung, grid = volume.read("image"), volume.read("mask") > 0, volume.provenance["grid"]
    spacing = tuple(grid["spacing_mm"])
    if method == "evidence":
        labels = evidence_labels(hu, lung, spacing)
    elif method == "hu-thresholds":
        labels = threshold_labels(hu, lung)
    else:
        with store.open(case_id, "labels", method) as found:
            labels = found.read("labels")
    return Scan(hu, lung, spacing, Geometry.from_dict(grid), labels)


def evidence_labels(hu: np.ndarray, lung: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Tissue evidence on cells of about ``CELL_MM``, most probable class, small pieces joined."""
    cell = max(1, round(CELL_MM / spacing_mm[0]))
    found = dense_statistics(hu, lung, cell=cell, spacing_mm=spacing_mm)
    posterior = fill_uncovered(*evidence_posterior(found, tissue_probabilities(found)))
    labels = posterior_labels(posterior, lung, token_size=cell)
    return remove_small_components(labels, posterior, voxel_ml=float(np.prod(spacing_mm)) / 1000, token_size=cell)


def threshold_labels(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """Cuts at -950, -700, -500 and -300 HU on the scan after a median filter of 3 voxels."""
    cuts = (LAA950_HU, HEALTHY_MEDIAN_HU, FIBROSIS_HU, CONSOLIDATION_MEDIAN_HU)
    order = (Tissue.EMPHYSEMA, Tissue.HEALTHY, Tissue.GGO, Tissue.FIBROSIS, Tissue.CONSOLIDATION)
    ids = np.asarray(order, dtype=np.uint8)
    return np.where(lung, ids[np.digitize(median_filter(hu, 3), cuts, right=True)], np.uint8(0))


def share(mask: np.ndarray, lung: np.ndarray) -> float:
    """Percent of the lung."""
    return 100.0 * np.count_nonzero(mask & lung) / np.count_nonzero(lung)


def slice_shares(mask: np.ndarray, lung: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percent of the lung in each axial slice that has 1 % of the fullest slice's lung or more, and those slices."""
    area = lung.sum(axis=(1, 2))
    used = np.flatnonzero(area >= 0.01 * area.max())
    return 100.0 * (mask & lung).sum(axis=(1, 2))[used] / area[used], used


def emphysema_rows(scan: Scan) -> list[str]:
    """Emphysema against low attenuation areas."""
    smoothed = smooth_hu(scan.hu, scan.lung, [SMOOTHING_MM / s for s in scan.spacing_mm])
    found = scan.labels == Tissue.EMPHYSEMA
    raw = {name: share(scan.hu <= level, scan.lung) for name, level in LAA_HU.items()}
    ours, _ = slice_shares(found, scan.lung)
    low, _ = slice_shares(scan.hu <= LAA950_HU, scan.lung)
    rho = stats.spearmanr(ours, low).statistic
    value = share(found, scan.lung)
    passed = raw["laa950"] <= value <= raw["laa910"] + 5
    return [
        f"| elastix-emphysema | emphysema % of lung | {value:.1f} | LAA-950 {raw['laa950']:.1f} to LAA-910 + 5 = "
        f"{raw['laa910'] + 5:.1f} ({'inside' if passed else 'outside'}); smoothed LAA-950 "
        f"{share(smoothed <= LAA950_HU, scan.lung):.1f} |",
        f"| elastix-emphysema | per-slice Spearman with LAA-950 | {rho:.3f} | at least 0.8, {len(low)} slices |",
    ]


def infection_rows(scan: Scan, folder: Path) -> list[str]:
    """Ground glass and consolidation against the infected slices that radiologists named."""
    notes = json.loads((folder / "labels.json").read_text())["slices"]
    # Slice location falls as the index rises, and z of the patient with it.
    position = np.asarray([entry["slice_location"] for entry in notes])
    infected = np.asarray([entry["infected"] for entry in notes], dtype=bool)
    centres = scan.grid.origin_mm[0] + np.arange(len(scan.hu)) * scan.spacing_mm[0]
    rows = []
    opaque = np.isin(scan.labels, [Tissue.GGO, Tissue.CONSOLIDATION])
    for name, mask in (
        ("ground glass + consolidation", opaque),
        ("all but healthy and emphysema", opaque | (scan.labels == Tissue.FIBROSIS)),
        ("HU above -700, median filter", median_filter(scan.hu, 3) > HEALTHY_MEDIAN_HU),
    ):
        shares, used = slice_shares(mask, scan.lung)
        nearest = np.abs(centres[used][:, None] - position[None]).argmin(axis=1)
        apart = float(np.abs(centres[used] - position[nearest]).max())
        area = roc_auc_score(infected[nearest], shares)
        rows.append(
            f"| covid-p002 | per-slice ROC-AUC of {name} | {area:.3f} | {len(used)} slices of the working grid, "
            f"{int(infected[nearest].sum())} infected; slices matched within {apart:.1f} mm |"
        )
    return rows


def kernel_rows(scans: dict[str, Scan]) -> list[str]:
    """Agreement of two reconstructions of one scan, and the LAA-950 gap before and after smoothing."""
    soft, sharp = (scans[name] for name in KERNELS)
    moved = [
        resample_onto(array.astype(np.uint8), sharp.grid, soft.grid, kind="mask", fill=0)
        for array in (sharp.lung, sharp.labels)
    ]
    both = soft.lung & (moved[0] > 0)
    rows = []
    for tissue in MIXTURE_TISSUES:
        one, other = soft.labels == tissue, moved[1] == tissue
        parts = share(one, both), share(other, both)
        counts = min(parts) >= 100 * COMMON_SHARE
        value = f"{100 * dice(one & both, other & both):.1f} %" if counts else "not counted"
        name = TISSUES[tissue].title
        rows.append(f"| lungdx-a0002 | agreement (DSC), {name} | {value} | {parts[0]:.1f} % and {parts[1]:.1f} % |")
    for name, values in (
        ("raw", [scan.hu for scan in (soft, sharp)]),
        *(
            (f"smoothed by {mm:g} mm", [smooth_hu(s.hu, s.lung, [mm / v for v in s.spacing_mm]) for s in (soft, sharp)])
            for mm in (SMOOTHING_MM, 2 * SMOOTHING_MM)
        ),
    ):
        low = [share(v <= LAA950_HU, s.lung) for v, s in zip(values, (soft, sharp), strict=True)]
        rows.append(
            f"| lungdx-a0002 | LAA-950 gap, {name} | {low[1] - low[0]:.1f} | {low[0]:.1f} % and {low[1]:.1f} % |"
        )
    found = [share(scan.labels == Tissue.EMPHYSEMA, scan.lung) for scan in (soft, sharp)]
    rows.append(f"| lungdx-a0002 | emphysema gap | {found[1] - found[0]:.1f} | {found[0]:.1f} % and {found[1]:.1f} % |")
    return rows


def make_store(scan: Path, place: Path, spacing_mm: float, *options: str) -> None:
    """Preprocess a scan, unless the store is there."""
    if (place / "store.json").exists():
        return
    command = [sys.executable, "-m", "lungseg.cli.app", "preprocess", str(scan), "-o", str(place), "--quiet"]
    subprocess.run([*command, "--preset", "small", "--spacing-mm", str(spacing_mm), *options], check=True)


def make_labels(place: Path) -> None:
    """Label maps of the default method in a store, and what ``refine`` exports of them; what is there is kept."""
    lungseg = [sys.executable, "-m", "lungseg.cli.app"]
    name = ["--name", DEFAULT_METHOD, "--quiet"]
    subprocess.run([*lungseg, "cluster", str(place), "--method", DEFAULT_METHOD, *name], check=True)
    results = place.parent / "results" / place.name
    subprocess.run([*lungseg, "refine", str(place), "--export", str(results), *name], check=True)


def series_keys(folder: Path) -> dict[str, str]:
    """Kernel -> key of its series."""
    command = [sys.executable, "-m", "lungseg.cli.app", "preprocess", "--list", "--json", str(folder)]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {row["kernel"]: row["series"] for row in listed["series"]}


def main() -> None:
    """Print what is known of each scan beside what the method says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared-data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default=DEFAULT_METHOD)
    parser.add_argument("--spacing-mm", type=float, default=1.0)
    arguments = parser.parse_args()
    data, work = arguments.shared_data, arguments.work
    rows = [f"| scan | figure | {arguments.method} | known |", "|---|---|---|---|"]
    emphysema = data / "elastix-emphysema"
    make_store(
        emphysema / "ct.mha",
        work / "elastix",
        arguments.spacing_mm,
        "--lung-mask",
        str(emphysema / "right_lung_mask.mha"),
    )
    make_store(data / "covid-p002" / "dicom", work / "covid", arguments.spacing_mm)
    folder = data / "lungdx-a0002" / "dicom"
    for kernel in KERNELS:
        if not (work / kernel / "store.json").exists():
            make_store(folder, work / kernel, arguments.spacing_mm, "--series", series_keys(folder)[kernel])
    if arguments.method == DEFAULT_METHOD:
        for name in ("elastix", "covid", *KERNELS):
            make_labels(work / name)
    rows += emphysema_rows(read_scan(work / "elastix", arguments.method))
    rows += infection_rows(read_scan(work / "covid", arguments.method), data / "covid-p002")
    rows += kernel_rows({kernel: read_scan(work / kernel, arguments.method) for kernel in KERNELS})
    print("\n".join(rows))


if __name__ == "__main__":
    main()
