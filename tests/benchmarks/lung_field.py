"""Seconds, peak memory and quality of the lung field.

Run: ``python tests/benchmarks/lung_field.py [--slices 400] [--shared-data DIR]``. Prints Markdown: (a) a scan of
512 x 512 x 400 voxels made of a digital phantom, against the same thresholds in plain SimpleITK (smoothing, threshold,
components, closing by a ball, filled holes), each in a process of its own; (b) where the shared data are present, every
chest there, with the masks and lesions that come with it. Memory is the high-water mark of the process.
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

SPACING_MM = (0.8, 0.7, 0.7)
PHANTOM_MM = (1.6, 1.4, 1.4)
SIZE = 512
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LESION_HU = -500.0
"""Voxels of a tumour box above this count as its dense part."""
ABOVE_MUSCLE_HU = 150.0
CLOSING_MM = 8.0


def write_scan(path: Path, slices: int) -> None:
    """A severe phantom, each voxel repeated, with the noise of the fine grid."""
    from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom

    extent = (slices * SPACING_MM[0], SIZE * SPACING_MM[1], SIZE * SPACING_MM[2])
    made = make_phantom(PhantomSpec(extent, PHANTOM_MM, "severe", DISEASES), seed=902)
    volume = made.volume_hu.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    rng = np.random.default_rng(0)
    for plane in volume:
        plane += rng.normal(0.0, 20.0, plane.shape).astype(np.int16)
    np.save(path, volume)


def plain_simpleitk(volume: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """The textbook lung field: threshold, components inside the body, closing by a ball, filled holes; full size."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing_mm[::-1])
    air = sitk.SmoothingRecursiveGaussian(image, 0.8) < -320
    border = sitk.GetArrayFromImage(sitk.ConnectedComponent(air))
    ids, counts = np.unique(border, return_counts=True)
    faces = np.unique(
        np.concatenate([border[:, s].ravel() for s in (0, -1)] + [border[:, :, s].ravel() for s in (0, -1)])
    )
    inside = [(count, i) for i, count in zip(ids, counts, strict=True) if i and i not in faces]
    keep = [int(i) for count, i in sorted(inside)[-2:] if count > 0.06 * max(inside)[0]]
    lung = sitk.GetImageFromArray(np.isin(border, keep).astype(np.uint8))
    closed = sitk.BinaryMorphologicalClosing(lung, [round(CLOSING_MM / s) for s in spacing_mm[::-1]], sitk.sitkBall)
    return sitk.GetArrayFromImage(sitk.BinaryFillhole(closed))


def run_one(scan: Path, spacing_mm: tuple[float, ...], method: str) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of one lung field in this process; labels go to ``scan`` + ``.labels``."""
    volume = np.load(scan)
    from lungseg.scan.lungs import find_lungs

    before = peak_gib()
    begin = time.perf_counter(), time.process_time()
    labels = find_lungs(volume, spacing_mm).labels if method == "lungseg" else plain_simpleitk(volume, spacing_mm)
    seconds, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    np.save(f"{scan}.labels.npy", labels)
    return {"seconds": seconds, "cpu": cpu, "before_gib": before, "peak_gib": peak_gib()}


def peak_gib() -> float:
    """High-water mark of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def in_child(scan: Path, spacing_mm: tuple[float, ...], method: str) -> dict[str, float]:
    """:func:`run_one` in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--one", str(scan), "--method", method, "--spacing", *map(str, spacing_mm)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


def real_chests(shared: Path) -> list[tuple[str, np.ndarray, tuple[float, ...], np.ndarray | None, np.ndarray | None]]:
    """Name, HU, spacing, reference mask and lesion of each scan of a chest; None where there is none."""
    import SimpleITK as sitk

    def image(path: str) -> tuple[np.ndarray, tuple[float, ...]]:
        read = sitk.ReadImage(str(shared / path))
        return sitk.GetArrayFromImage(read), read.GetSpacing()[::-1]

    def series(folder: str, index: int = 0) -> tuple[np.ndarray, tuple[float, ...], list[str]]:
        reader = sitk.ImageSeriesReader()
        uid = reader.GetGDCMSeriesIDs(str(shared / folder))[index]
        names = reader.GetGDCMSeriesFileNames(str(shared / folder), uid)
        reader.SetFileNames(names)
        read = reader.Execute()
        return sitk.GetArrayFromImage(read), read.GetSpacing()[::-1], [Path(n).name for n in names]

    found = []
    volume, spacing = image("cip-small/ct-64.nrrd")
    found.append(("cip-small ct-64", volume, spacing, image("cip-small/wholeLung-64.nrrd")[0] > 0, None))
    volume, spacing = image("elastix-emphysema/ct.mha")
    found.append(("elastix-emphysema", volume, spacing, image("elastix-emphysema/right_lung_mask.mha")[0] > 0, None))
    volume, spacing, _ = series("covid-p002/dicom")
    found.append(("covid-p002", volume, spacing, None, None))
    boxes = json.loads((shared / "lungdx-a0002" / "boxes.json").read_text(encoding="utf-8"))["boxes"]
    for index, kernel in enumerate(("B40f", "B70f")):
        volume, spacing, names = series("lungdx-a0002/dicom", index)
        lesion = np.zeros(volume.shape, dtype=bool)
        for box in boxes:
            if box["file"] in names:
                px = box["box_px"]
                view = np.s_[names.index(box["file"]), px["ymin"] : px["ymax"], px["xmin"] : px["xmax"]]
                lesion[view] = (volume[view] > LESION_HU) & (volume[view] < ABOVE_MUSCLE_HU)
        found.append((f"lungdx-a0002 {kernel}", volume, spacing, None, lesion if lesion.any() else None))
    volume, spacing, _ = series("lidc0001-slab/dicom")
    found.append(("lidc0001-slab", volume, spacing, None, None))
    for path in sorted((shared / "nysbu-shared").glob("*_axial_*.dcm")):
        volume, spacing = image(f"nysbu-shared/{path.name}")
        found.append((f"nysbu {path.stem[:7]} {path.stem[-3:]}", volume, (5.0, *spacing[1:]), None, None))
    return found


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two masks."""
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


def print_real(shared: Path, folder: Path) -> None:
    """The table of the shared scans."""
    print(
        "\n| scan | volume L | left L | right L | mean HU | LAA-950 % | CPU s | GiB | DSC | lesion inside | warnings |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    from lungseg.scan.lungs import find_lungs

    for name, volume, spacing, mask, lesion in real_chests(shared):
        scan = folder / "real.npy"
        np.save(scan, volume)
        cost = in_child(scan, spacing, "lungseg")
        labels = np.load(f"{scan}.labels.npy")
        lung = labels > 0
        litres = [float((labels == s).sum()) * float(np.prod(spacing)) / 1e6 for s in (1, 2)]
        hu = volume[lung]
        mean, laa = (f"{hu.mean():.0f}", f"{100.0 * (hu <= -950).mean():.1f}") if hu.size else ("", "")
        overlap = "" if mask is None else f"{dice(lung, mask):.3f}"
        inside = "" if lesion is None else f"{lung[lesion].mean():.2f}"
        words = "; ".join(w.split(":")[0] for w in find_lungs(volume, spacing).warnings)
        print(
            f"| {name} | {sum(litres):.2f} | {litres[0]:.2f} | {litres[1]:.2f} | {mean} | {laa} "
            f"| {cost['cpu']:.1f} | {cost['peak_gib']:.2f} | {overlap} | {inside} | {words} |"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--shared-data", type=Path, default=SHARED)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--spacing", type=float, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.one, tuple(arguments.spacing), arguments.method)))
        return
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "scan.npy"
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; from lung_field import write_scan; "
             f"from pathlib import Path; write_scan(Path({str(scan)!r}), {arguments.slices})"],
            check=True,
        )  # fmt: skip
        print(f"512 x 512 x {arguments.slices} voxels of {SPACING_MM} mm\n")
        print("| lung field | s | CPU s | GiB before | peak GiB |\n|---|---|---|---|---|")
        for method in ("lungseg", "SimpleITK"):
            cost = in_child(scan, SPACING_MM, method)
            print(
                f"| {method} | {cost['seconds']:.1f} | {cost['cpu']:.1f} "
                f"| {cost['before_gib']:.2f} | {cost['peak_gib']:.2f} |",
                flush=True,
            )
        if arguments.shared_data.is_dir():
            print_real(arguments.shared_data, Path(folder))
        else:
            print(f"\nno real chests: {arguments.shared_data} is missing")


if __name__ == "__main__":
    main()
