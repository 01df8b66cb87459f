"""Scans per second of ``lungseg preprocess`` against a plain SimpleITK script and MONAI on the same DICOM series.

Run: ``python tests/benchmarks/preprocess_speed.py [--shared-data DIR] [--repeats 5]``. Every run is a process of its
own with one thread; imports are not counted (a cohort pays for them once). The tools take turns, so that a busy machine
is busy for all; medians of CPU seconds are compared. All of them read a series, bring it to 1 mm, crop it and write
int16 HDF5 (chunks of 16x32x32, gzip 4, shuffle). Only ``lungseg preprocess`` finds the lungs and stores the scan's own
grid besides; ``read, resample, write`` is what remains of it without these (geometry and HU are still checked).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SPACING_MM = 1.0
FOREGROUND_HU = -500
CHUNK = (16, 32, 32)
STEPS = {
    "search": "find files, read headers", "read_series": "decode, HU, checks", "find_lungs": "lungs",
    "resample_to_spacing": "resample", "patch_table": "patch table", "write_artefact": "compress and write",
}  # fmt: skip
"""Functions of the package whose share of the time is told."""


def crop_and_write(array: np.ndarray, path: Path) -> None:
    """Crop to the box of everything denser than lung, and write."""
    import h5py

    foreground = array > FOREGROUND_HU
    box = []
    for axis in range(3):
        hit = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    cropped = np.ascontiguousarray(array[tuple(box)], dtype=np.int16)
    with h5py.File(path, "w") as file:
        chunks = tuple(min(c, n) for c, n in zip(CHUNK, cropped.shape, strict=True))
        file.create_dataset("image", data=cropped, chunks=chunks, compression="gzip", compression_opts=4, shuffle=True)


# ---------------------------------------------------------------- the tools, each in its own process


def run_lungseg(series: Path, work: Path) -> dict[str, float]:
    """The whole of ``lungseg preprocess``, and the CPU seconds of its steps."""
    from lungseg.config import Execution, PreprocessConfig
    from lungseg.stages.preprocess import preprocess

    spent: Counter[str] = Counter()
    depth = [0]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if depth[0] == 0:  # not twice for a step within a step
                    spent[name] += time.process_time() - begin

        return run

    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("lungseg.")]
    for name in STEPS:
        for module in modules:
            if name in vars(module):
                setattr(module, name, timed(name, vars(module)[name]))
    preprocess(series, work / "store", PreprocessConfig(spacing_mm=SPACING_MM), execution=Execution(quiet=True))
    return dict(spent)


def run_lean(series: Path, work: Path) -> dict[str, float]:
    """lungseg's reader and resampling without lungs and source grid."""
    from lungseg.scan.resample import resample_to_spacing
    from lungseg.scan.sources import find_sources

    (source,) = find_sources([series])
    volume = source.read()
    array, _ = resample_to_spacing(volume.array, volume.geometry, (SPACING_MM,) * 3, kind="ct")
    crop_and_write(array, work / "a.h5")
    return {}


def run_sitk(series: Path, work: Path) -> dict[str, float]:
    """The script that most people write."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    image = reader.Execute()
    size = [max(1, round(n * s / SPACING_MM)) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    resample = sitk.ResampleImageFilter()
    resample.SetOutputSpacing([SPACING_MM] * 3)
    resample.SetSize(size)
    resample.SetOutputOrigin(image.GetOrigin())
    resample.SetOutputDirection(image.GetDirection())
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetDefaultPixelValue(-1024)
    crop_and_write(sitk.GetArrayFromImage(resample.Execute(image)), work / "a.h5")
    return {}


def run_monai(series: Path, work: Path) -> dict[str, float]:
    """MONAI's loader, spacing and foreground crop."""
    from monai.transforms import Compose, CropForeground, EnsureChannelFirst, LoadImage, Spacing

    transforms = Compose([
        LoadImage(reader="PydicomReader", image_only=True), EnsureChannelFirst(),
        Spacing(pixdim=(SPACING_MM,) * 3, mode="bilinear"), CropForeground(select_fn=lambda x: x > FOREGROUND_HU),
    ])  # fmt: skip
    array = np.rint(np.asarray(transforms(str(series)))[0]).transpose(2, 1, 0)
    crop_and_write(array.clip(-1024, 32767).astype(np.int16), work / "a.h5")
    return {}


TOOLS: dict[str, tuple[Callable[[Path, Path], dict[str, float]], tuple[str, ...]]] = {
    "lungseg preprocess": (run_lungseg, ("lungseg.stages.preprocess", "SimpleITK", "pydicom", "scipy.ndimage")),
    "lungseg: read, resample, write": (run_lean, ("lungseg.scan.sources", "SimpleITK", "pydicom", "scipy.ndimage")),
    "SimpleITK script": (run_sitk, ("SimpleITK",)),
    "MONAI (PydicomReader)": (run_monai, ("monai.transforms", "pydicom")),
}
"""Name, function, and what it imports before the clock starts."""


def run_one(tool: str, series: Path) -> dict[str, Any]:
    """One scan through one tool."""
    function, modules = TOOLS[tool]
    for module in ("h5py", *modules):
        importlib.import_module(module)
    if "monai" in tool.lower():
        import torch

        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        cpu, wall = time.process_time(), time.perf_counter()
        steps = function(series, Path(work))
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "steps": steps}


# ---------------------------------------------------------------- the comparison


def phantom_series(folder: Path) -> Path:
    """A digital chest of 200 x 256 x 256 voxels as uncompressed DICOM."""
    from lungseg.scan.dicom import write_dicom_series
    from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom
    from lungseg.scan.volume import Volume

    spec = PhantomSpec((300.0, 281.6, 332.8), (1.5, 1.1, 1.3), "moderate", DISEASES)
    made = make_phantom(spec, seed=900)
    write_dicom_series(
        folder, Volume(made.volume_hu, made.geometry), patient_id="phantom", series_seed="bench", compress=False
    )
    return folder


def child(tool: str, series: Path) -> dict[str, Any] | str:
    """The figures of one run, or why there are none."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    threads["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, "--one", tool, str(series)],
        capture_output=True, text=True, check=False, env=os.environ | threads,
    )  # fmt: skip
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["died"])[-1][:150]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print one table per series, and where the time of ``lungseg preprocess`` goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared-data", type=Path, default=SHARED_DATA)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "SERIES"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one[0], Path(options.one[1]))))
        return
    with tempfile.TemporaryDirectory() as work:
        cases = {"digital phantom 200x256x256, uncompressed": phantom_series(Path(work) / "phantom")}
        covid = options.shared_data / "covid-p002" / "dicom"
        if covid.is_dir():
            cases["covid-p002 133x512x512, JPEG lossless"] = covid
        for name, series in cases.items():
            runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
            failed: dict[str, str] = {}
            for _ in range(options.repeats):
                for tool in TOOLS:
                    result = {} if tool in failed else child(tool, series)
                    if isinstance(result, str):
                        failed[tool] = result
                    elif result:
                        runs[tool].append(result)
            _print(name, runs, failed)


def _print(name: str, runs: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> None:
    print(f"\n{name}, to {SPACING_MM:g} mm\n")
    print("| tool | CPU s | wall s | scans per CPU minute | CPU time against the SimpleITK script |")
    print("|---|---|---|---|---|")
    medians = {tool: statistics.median(r["cpu"] for r in results) for tool, results in runs.items() if results}
    for tool, results in runs.items():
        if tool in failed:
            print(f"| {tool} | not run: {failed[tool]} | | | |")
            continue
        wall = statistics.median(r["wall"] for r in results)
        ratio = medians[tool] / medians["SimpleITK script"] if "SimpleITK script" in medians else float("nan")
        print(f"| {tool} | {medians[tool]:.2f} | {wall:.2f} | {60 / medians[tool]:.1f} | {ratio:.2f} |")
    main_runs = runs["lungseg preprocess"]
    if main_runs:
        shares = {step: statistics.median(r["steps"].get(step, 0.0) / r["cpu"] for r in main_runs) for step in STEPS}
        words = [f"{STEPS[step]} {100 * share:.0f} %" for step, share in shares.items()]
        rest = 1 - sum(shares.values())
        print(f"\nWhere its time goes: {', '.join(words)}, rest {100 * rest:.0f} %.")


if __name__ == "__main__":
    main()
