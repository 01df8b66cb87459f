"""Every series and image file of the shared data: read or refused, why, how fast, and equal to another reading.

Run: ``python tests/benchmarks/real_series.py [--shared-data DIR]``. Prints a Markdown table; ends with 1 if a verdict
is not the expected one or a voxel differs. Each row is read by a process of its own, whose peak memory is told. What
was read is compared with pydicom's own pixel data (slope, intercept and order by position applied here) and with
SimpleITK for image files. JPEG syntaxes need the decoders of pylibjpeg and pyjpegls; without them the column says so.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
IMAGES = (".nii.gz", ".nrrd", ".mha")
LABELS = re.compile(r"label|mask|wholeLung|lm-64")
READ = "read"
EXPECTED: tuple[tuple[str, str], ...] = (
    (r"covid-p002", READ),
    (r"lungdx-a0002", READ),
    (r"lidc0001-slab", READ),
    (r"cip-small/ct-64Dicom", READ),
    (r"cip-small/simple_dicom", r"only 2 slices"),
    (r"nysbu-shared.*(coronal|sagittal)", r"single|only 1"),
    (r"nysbu-shared", r"only 1 slice"),
    (r"encodings", r"only 1 slice|different images"),
    (r"ge_tilt_irregular", r"tilt|uneven|only 5"),
    (r"philips_mixed/localizer", r"localizer"),
    (r"philips_mixed/summary", r"secondary capture"),
    (r"philips_mixed/tilt", r"tilt|only [23]"),
    (r"minimal_tags", r"only 1 slice|missing"),
    (r"multiframe", r"only 2 slices"),
    (r"crop_ct_2slices\.nrrd", r"slices"),
    (r"ibsi/digital_phantom/image", r"HU|slices|spacing"),
    (r"pyradiomics-baseline/.*_image", r"HU"),
    (r".*", READ),
)
"""The first pattern that fits the place of a scan, and how it must end: read, or words of the reason."""
SYNTAX_NAMES = {"1.2.840.10008.1.2": "implicit LE", "1.2.840.10008.1.2.1": "explicit LE",
                "1.2.840.10008.1.2.4.70": "JPEG lossless", "1.2.840.10008.1.2.4.80": "JPEG-LS",
                "1.2.840.10008.1.2.4.90": "JPEG 2000", "1.2.840.10008.1.2.4.91": "JPEG 2000 lossy",
                "1.2.840.10008.1.2.5": "RLE"}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One row: a series of a folder, by the key the reader gives it, or an image file."""

    place: str
    path: str
    key: str = ""


def units(root: Path) -> Iterator[Unit]:
    """Every series and image file, in order of place."""
    from lungseg.errors import InputError
    from lungseg.scan.dicom import find_series

    folders = sorted({path.parent for path in root.rglob("*") if path.is_file()})
    for folder in folders:
        for path in sorted(p for p in folder.iterdir() if p.name.endswith(IMAGES)):
            yield Unit(str(path.relative_to(root)), str(path))
        try:
            found = find_series(folder).series
        except InputError:
            continue
        for series in found:
            if {file.parent for file in series.files} != {folder}:
                continue  # comes with its own folder
            place = str(folder.relative_to(root))
            if len(found) > 1:
                name = series.files[0].stem
                place += f"/{name}" if len(series.files) == 1 else f"/{name} and {len(series.files) - 1} more"
            yield Unit(place, str(folder), series.key)


def mixed_slabs(root: Path, work: Path) -> Iterator[Unit]:
    """The LIDC slab with one of its slices in another transfer syntax: must be the same volume (lossy: nearly)."""
    slab, encodings = root / "lidc0001-slab" / "dicom", root / "encodings"
    if not (slab.is_dir() and encodings.is_dir()):
        return
    from lungseg.scan.dicom import find_series

    for encoded in sorted(encodings.glob("*.dcm")):
        folder = work / encoded.stem
        folder.mkdir()
        for file in slab.iterdir():
            (folder / file.name).write_bytes((encoded if file.name == "005.dcm" else file).read_bytes())
        yield Unit(f"lidc0001-slab with 005 as {encoded.stem}", str(folder), find_series(folder).series[0].key)


# ---------------------------------------------------------------- in the child


def read_one(unit: Unit) -> dict[str, Any]:
    """Facts of one scan, what the reader said, and whether an independent reading agrees."""
    from lungseg.errors import LungsegError
    from lungseg.scan.dicom import find_series, read_series
    from lungseg.scan.nifti import read_image
    from lungseg.scan.sources import find_sources

    path, labels = Path(unit.path), bool(LABELS.search(unit.path))
    facts: dict[str, Any] = {
        "place": unit.place,
        "vendor": "",
        "syntax": path.suffix.strip(".") if not unit.key else "",
    }
    begin = time.perf_counter()
    series = None
    try:
        if unit.key:
            series = next(s for s in find_series(path).series if s.key == unit.key)
            facts |= _dicom_facts(series.files)
            volume = read_series(series)
        else:
            volume = read_image(path, integer=True) if labels else find_sources([path])[0].read()
    except LungsegError as error:
        facts["verdict"] = _short(str(error), unit)
        return facts | _costs(begin)
    facts |= {"verdict": READ + (": " + "; ".join(volume.notes) if volume.notes else "")} | _costs(begin)
    grid = volume.geometry
    facts["shape"] = "x".join(str(n) for n in grid.shape)
    facts["spacing"] = " x ".join(f"{s:.4g}" for s in grid.spacing_mm)
    facts["orientation"] = _orientation(volume)
    facts["hu"] = "labels" if labels else _modes(volume.array)
    facts["equal"] = _compare_series(series.files, volume) if series else _compare_image(path, volume, labels=labels)
    return facts


def _costs(begin: float) -> dict[str, float]:
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the parent before it became this process
        peak = int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.perf_counter() - begin, "peak_mib": peak}


def _dicom_facts(files: tuple[Path, ...]) -> dict[str, str]:
    import pydicom

    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    syntax = str(first.file_meta.TransferSyntaxUID)
    return {"vendor": str(first.get("Manufacturer", "")), "syntax": SYNTAX_NAMES.get(syntax, syntax),
            "shape": f"{len(files)}x{first.get('Rows', '?')}x{first.get('Columns', '?')}"}  # fmt: skip


def _short(text: str, unit: Unit) -> str:
    """A message without its path and the name of its series."""
    text = text.replace(unit.path, "").strip(": ")
    text = re.sub(r"^series [^:]*?\([^)]*\): |^series \w+: ", "", text)
    return "refused: " + (text if len(text) < 170 else text[:167] + "...")


def _orientation(volume: Any) -> str:
    """Axes of the file (slowest first) as the patient directions they run to, and the angle that is left."""
    letters = ("IS", "AP", "RL")
    words = [""] * 3
    for canonical, (axis, flipped) in enumerate(zip(volume.stored_axes, volume.stored_flips, strict=True)):
        words[axis] = letters[canonical][0 if flipped else 1]
    cosine = min(abs(volume.geometry.direction[i][i]) for i in range(3))
    angle = np.degrees(np.arccos(min(1.0, cosine)))
    return "".join(words) + (f", {angle:.1f} deg oblique" if angle > 0.05 else "")


def _modes(array: np.ndarray) -> str:
    """Most frequent HU of air, fat and soft tissue."""
    words = []
    for name, low, high in (("air", -1023, -900), ("fat", -150, -60), ("soft", 0, 90)):
        counts = np.bincount(array[(array >= low) & (array < high)].astype(int) - low, minlength=high - low)
        smooth = np.convolve(counts, np.ones(9), "same")
        if counts.sum() > 0.002 * array.size:
            words.append(f"{name} {low + int(smooth.argmax())}")
    return ", ".join(words)


def _compare_series(files: tuple[Path, ...], volume: Any) -> str:
    """Equality with pydicom's pixel data, ordered, rescaled and turned here."""
    import pydicom

    slices = [pydicom.dcmread(file) for file in dict.fromkeys(files)]
    cosines = np.array([float(v) for v in slices[0].ImageOrientationPatient]).reshape(2, 3)
    normal = np.cross(cosines[0], cosines[1])
    slices.sort(key=lambda ds: float(np.dot(normal, [float(v) for v in ds.ImagePositionPatient])))
    try:
        planes = [
            ds.pixel_array.astype(np.float64) * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices
        ]
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        return f"not checked (no decoder: {type(error).__name__})"
    hu = np.rint(np.stack(planes)).clip(-1024, 32767).astype(np.int16)
    steps = np.stack([normal, cosines[1], cosines[0]])[:, ::-1]  # slice, row, column axis in (S, P, L)
    return _compare(hu, steps, volume)


def _compare_image(path: Path, volume: Any, *, labels: bool) -> str:
    """Equality with SimpleITK's reading."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    array = array if labels else np.rint(array).clip(-1024, 32767)
    steps = np.asarray(image.GetDirection()).reshape(3, 3).T[::-1, ::-1]
    return _compare(array.astype(volume.array.dtype), steps, volume)


def _compare(array: np.ndarray, steps: np.ndarray, volume: Any) -> str:
    """``steps``: one row per array axis, its direction in (S, P, L)."""
    order = np.abs(steps).argmax(axis=0)  # array axis that runs along S, P, L
    turned = array.transpose(order)
    turned = np.flip(turned, [i for i in range(3) if steps[order[i], i] < 0])
    if turned.shape != volume.array.shape:
        return f"NO: shape {turned.shape}"
    differing = turned != volume.array
    if not differing.any():
        return "yes"
    if (volume.array[differing] == -1024).all():
        return f"yes, but {differing.sum()} voxels of padding"
    largest = int(np.abs(turned.astype(int) - volume.array)[differing].max())
    return f"NO: {differing.sum()} voxels, by up to {largest}"


# ---------------------------------------------------------------- in the parent


def run_child(unit: Unit) -> dict[str, Any]:
    """The facts of one unit from a process of its own."""
    command = [sys.executable, __file__, "--one", unit.place, unit.path, unit.key]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"place": unit.place, "verdict": f"DIED with exit code {done.returncode}: {done.stderr[-300:]}"}
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def as_expected(facts: dict[str, Any]) -> bool:
    """Whether the verdict is the right one, and what was read is equal."""
    wanted = next(verdict for pattern, verdict in EXPECTED if re.search(pattern, facts["place"]))
    verdict = facts["verdict"]
    if "NO:" in facts.get("equal", "") and "lossy" not in facts["place"]:
        return False
    return verdict.startswith(READ) if wanted == READ else bool(re.search(wanted, verdict)) and verdict[:4] != READ


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared-data", type=Path, default=SHARED_DATA)
    parser.add_argument("--one", nargs=3, metavar=("PLACE", "PATH", "KEY"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(read_one(Unit(*options.one))))
        return 0
    if not options.shared_data.is_dir():
        print(f"real CT data not found at {options.shared_data} (give --shared-data DIR): nothing to show")
        return 0
    columns = (
        "place",
        "vendor",
        "syntax",
        "shape",
        "spacing",
        "orientation",
        "hu",
        "verdict",
        "seconds",
        "peak_mib",
        "equal",
    )
    heads = ("series or file", "vendor", "syntax", "shape", "spacing mm (z, y, x)", "file axes", "HU modes", "verdict",
             "s", "peak MiB", "equal to pydicom / SimpleITK")  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    wrong = []
    with tempfile.TemporaryDirectory() as work:
        for unit in [*units(options.shared_data), *mixed_slabs(options.shared_data, Path(work))]:
            facts = run_child(unit)
            for key, form in (("seconds", "{:.2f}"), ("peak_mib", "{:.0f}")):
                facts[key] = form.format(facts[key]) if key in facts else ""
            facts["verdict"] = str(facts["verdict"]).replace("|", "/").replace("\n", " ")
            if not as_expected(facts):
                wrong.append(facts["place"])
                facts["verdict"] = "**UNEXPECTED** " + facts["verdict"]
            print("| " + " | ".join(str(facts.get(column, "")) for column in columns) + " |", flush=True)
    print(f"\n{len(wrong)} verdicts or comparisons are not as expected" + (": " + ", ".join(wrong) if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
