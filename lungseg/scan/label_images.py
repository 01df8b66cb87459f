"""Label maps of any tool as classes of ours on one grid: NIfTI, NRRD, MetaImage, DICOM-SEG, or a folder of class files.

Files are named neither in messages nor in results: what is being read has a name given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.dicom_seg import Segmentation, read_segmentation
from lungseg.scan.discovery import DICOM_SUFFIXES, IMAGE_SUFFIXES, image_stem
from lungseg.scan.label_maps import LabelMap, to_classes
from lungseg.scan.masks import GRID_TOLERANCE_VOXELS, describe, same_grid
from lungseg.scan.nifti import read_image
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry, Volume
from lungseg.tissue import CLASS_NAMES, LABEL_CONVENTIONS, MAIN_NAMES, OUTSIDE, SEGMENT_CODES

DEFAULT_MAP = LabelMap("lungseg", LABEL_CONVENTIONS["lungseg"])
LABEL_SUFFIXES = (*IMAGE_SUFFIXES, *DICOM_SUFFIXES)


@dataclass(frozen=True)
class LabelImage:
    """Classes of one side of a case."""

    volume: Volume
    """uint8: ``Tissue`` and ``LungLabel`` ids, ``OUTSIDE``, ``UNCLASSIFIED``; canonical."""
    annotated: tuple[int, ...]
    """Slices in which any id is stored, even one that means none of our classes."""
    may_be_cropped: bool = False
    """Whether voxels outside its grid are known to be outside (DICOM-SEG leaves empty frames out)."""


def label_files(folder: Path) -> dict[str, Path]:
    """Label maps of a folder by case: files without their endings, and folders with one file for each class.

    A single file is taken for itself.

    Raises
    ------
    InputError
        If there is no such folder, or two label maps have one name.
    """
    if _is_label_file(folder):
        return {label_stem(folder): folder}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of label maps")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (_is_label_file(path) or _is_case_folder(path)):
            continue
        stem = path.name if path.is_dir() else label_stem(path)
        if stem in found:
            raise InputError(f"{folder}: both {found[stem].name} and {path.name} are label maps of one case; keep one")
        found[stem] = path
    return found


def label_stem(path: Path) -> str:
    """Name of a file without the ending of its format."""
    return image_stem(path, LABEL_SUFFIXES)


def _is_label_file(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(LABEL_SUFFIXES)


def _is_case_folder(path: Path) -> bool:
    return path.is_dir() and any(_is_label_file(child) for child in path.iterdir())


def read_labels(path: Path, mapping: LabelMap | None, *, name: str, option: str) -> LabelImage:
    """Label map of one case.

    Parameters
    ----------
    path : Path
        .nii, .nii.gz, .nrrd, .mha, .mhd; a DICOM Segmentation, or a folder with one; or a
        folder of masks, one for each class, named like it.
    mapping : LabelMap or None
        What the ids mean. None: those of lungseg; for DICOM-SEG what its segments are coded as.
    name, option : str
        What is being read, and the option that gives its label map, for messages.

    Raises
    ------
    InputError
        If the file cannot be read, or holds ids, segments or class files that the label map does not know.
    ResourceError
        If the machine could not hold it.

    Source
    ------
    RELIABILITY rows 25-36, 71.
    """
    if path.is_dir():
        dicom = [child for child in path.iterdir() if child.name.lower().endswith(DICOM_SUFFIXES)]
        if not dicom:
            return _read_folder(path, mapping or DEFAULT_MAP, name=name, option=option)
        if len(dicom) > 1:
            raise InputError(
                f"{name} is a folder of {len(dicom)} DICOM files: a scan? Give one DICOM-SEG for each case, "
                "as a file or alone in its folder"
            )
        path = dicom[0]
    if path.name.lower().endswith(DICOM_SUFFIXES):
        segmentation = read_segmentation(path)
        numbers = segmentation.volume
        if mapping is None:
            classes = _coded(segmentation, name=name, option=option)
        else:
            classes = to_classes(numbers.array, mapping, name=name, option=option)
        return _image(numbers, classes, may_be_cropped=True)
    stored = read_image(path, integer=True)
    return _image(stored, to_classes(stored.array, mapping or DEFAULT_MAP, name=name, option=option))


def _image(stored: Volume, classes: np.ndarray, *, may_be_cropped: bool = False) -> LabelImage:
    annotated = tuple(np.flatnonzero(stored.array.any(axis=(1, 2))).tolist())
    return LabelImage(Volume(classes, stored.geometry), annotated, may_be_cropped)


def _coded(segmentation: Segmentation, *, name: str, option: str) -> np.ndarray:
    """Classes of a DICOM Segmentation by the codes of its segments."""
    array = segmentation.volume.array
    table = np.zeros(int(np.iinfo(array.dtype).max) + 1, dtype=np.uint8)
    unknown = []
    for number, code in segmentation.codes.items():
        if number == 0:  # background of a label map
            continue
        if code is None or code not in SEGMENT_CODES:
            unknown.append(f"{number} ({' '.join(code) if code else 'no code'})")
        else:
            table[number] = SEGMENT_CODES[code]
    if unknown:
        raise InputError(
            f"{name}: the type codes of segments {', '.join(unknown)} are not known. Say what the segment numbers "
            f"mean with {option} FILE (number and name; `none` for segments that are no tissue)"
        )
    classes: np.ndarray = table[array]
    return classes


def _read_folder(folder: Path, mapping: LabelMap, *, name: str, option: str) -> LabelImage:
    """One label map from masks named like their class; voxels of two classes are refused."""
    files = {label_stem(p): p for p in sorted(folder.iterdir()) if _is_label_file(p) and not p.name.startswith(".")}
    named = mapping.convention.file_names
    classes = {stem: named.get(stem, OUTSIDE) if named else _class_by_name(stem) for stem in files}
    unknown = [stem for stem, value in classes.items() if value is None]
    if unknown:
        raise InputError(
            f"{name}: {len(unknown)} of {len(files)} files of its folder are not named like a class "
            f"({', '.join(MAIN_NAMES)}); rename them, move them away, or give {option} totalsegmentator"
        )
    wanted = {stem: value for stem, value in classes.items() if value}
    if not wanted:
        raise InputError(f"{name}: no file of its folder is one of the classes of label map '{mapping.name}'")
    first: Volume | None = None
    out = np.zeros(0, np.uint8)
    for stem, value in wanted.items():
        mask = read_image(files[stem], integer=True)
        if first is None:
            first, out = mask, np.zeros(mask.array.shape, dtype=np.uint8)
        elif not mask.geometry.is_close(first.geometry, tolerance_voxels=GRID_TOLERANCE_VOXELS):
            raise InputError(
                f"{name}: the masks of its classes lie on different grids.\n  {describe(first.geometry)}\n"
                f"  {describe(mask.geometry)}"
            )
        inside = mask.array != 0
        other = out[inside]
        if ((other != OUTSIDE) & (other != value)).any():
            raise InputError(f"{name}: masks of two classes overlap; one label a voxel is needed")
        out[inside] = value
    assert first is not None
    return _image(Volume(out, first.geometry), out)


def _class_by_name(stem: str) -> int | None:
    return CLASS_NAMES.get(" ".join(stem.lower().replace("-", " ").replace("_", " ").split()))


def onto_reference(image: LabelImage, grid: Geometry, *, resample: bool, name: str) -> tuple[np.ndarray, bool]:
    """Classes at the voxels of the reference.

    Parameters
    ----------
    image : LabelImage
    grid : Geometry
        Of the reference.
    resample : bool
        Accept another grid: nearest neighbour, outside of it nothing.
    name : str
        What is being placed, for the message.

    Returns
    -------
    labels : uint8 array, shape of ``grid``
        Exact, without interpolation, where both are one physical grid: corresponding corners within 0.1 of the
        smallest voxel edge, axes flipped or not; for DICOM-SEG also a part of that grid.
    is_resampled : bool
        Whether voxels had to be taken from another grid.

    Raises
    ------
    InputError
        If the grids differ and ``resample`` is off (both are printed), or no labelled voxel lies on ``grid``.

    Source
    ------
    RELIABILITY row 71.
    """
    volume = image.volume
    moved = same_grid(volume, grid)
    if moved is not None:
        return moved, False
    is_part = image.may_be_cropped and _is_part(volume.geometry, grid)
    if not resample and not is_part:
        limit = GRID_TOLERANCE_VOXELS * min(grid.spacing_mm)
        raise InputError(
            f"{name} and the reference lie on different grids (corners may differ by {limit:.2g} mm).\n"
            f"  prediction: {describe(volume.geometry)}\n  reference:  {describe(grid)}\n"
            "Use --resample-to reference to take the nearest voxel of the prediction at each voxel of the reference"
        )
    out = resample_onto(volume.array, volume.geometry, grid, kind="mask", fill=OUTSIDE)
    if volume.array.any() and not out.any():
        raise InputError(
            f"{name}: none of its labelled voxels lies in the reference: it belongs to another scan, or its origin is "
            f"wrong.\n  prediction: {describe(volume.geometry)}\n  reference:  {describe(grid)}"
        )
    return out, not is_part


def _is_part(part: Geometry, whole: Geometry) -> bool:
    """Whether one grid is a block of the other one."""
    start = np.rint(whole.to_index(part.origin_mm)).astype(int)
    stop = start + part.shape
    if (start < 0).any() or (stop > whole.shape).any():
        return False
    return whole.crop(start.tolist(), stop.tolist()).is_close(part, tolerance_voxels=GRID_TOLERANCE_VOXELS)
