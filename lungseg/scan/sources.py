"""Which files form a case: folders, files and manifests become a list of scans to read, each one patient's.

Decided once, here, before anything is read: one case per DICOM study (its best chest series), one per image file.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom import Series, choose_series, find_series, read_series
from lungseg.scan.dicom_headers import Damaged, SliceHeader, read_header, walk_files
from lungseg.scan.dicom_series import build_series
from lungseg.scan.nifti import read_image
from lungseg.scan.volume import Volume

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
MANIFEST_COLUMNS = ("path", "series", "case_id", "patient_id", "split", "reference", "inspiration")
SPLITS = ("", "train", "val", "test")
INSPIRATIONS = ("", "inspiration", "expiration")


@dataclass(frozen=True)
class Source:
    """One scan to read, or the reason why it cannot be."""

    path: Path
    """What the user gave. Never written to an artefact: folder names hold patient names."""
    series: Series | None = None
    """Chosen DICOM series; None for an image file."""
    others: tuple[str, ...] = ()
    """Series of the study that were not used, and why."""
    problem: str = ""
    """Why there is nothing to read; empty if there is."""
    case_id: str = ""
    """Given by a manifest; else empty."""
    patient_id: str = ""
    """As in the DICOM header: to be hashed before it is written anywhere."""
    given_patient_id: str = ""
    """Given by a manifest; else empty."""
    split: str = ""
    reference: Path | None = None
    inspiration: str = ""

    def key(self) -> str:
        """What tells this scan from another one without reading its voxels; '' for image files."""
        if self.series is None:
            return ""
        size = sum(file.stat().st_size for file in self.series.files)
        return f"{self.series.series_uid}/{len(self.series.files)}/{size}"

    def read(self, options: ReadOptions = ReadOptions()) -> Volume:
        """The volume; ``InputError`` if it cannot be read as one."""
        if self.problem:
            raise InputError(self.problem)
        return read_image(self.path, options) if self.series is None else read_series(self.series, options)


def voxel_digest(volume: Volume) -> bytes:
    """SHA-256 of voxels and grid: identifies an image file that has no series UID."""
    digest = hashlib.sha256(repr(volume.geometry).encode())
    digest.update(volume.array.data)
    return digest.digest()


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """Scans under the given folders and files, in a fixed order; a bad one is listed with its problem.

    A study is one case, however many of the paths hold parts of it; files reached by several paths count once.

    Parameters
    ----------
    paths : sequence of Path
        DICOM folders (searched recursively, may hold many studies), image files, or folders of image files.

    Raises
    ------
    InputError
        If no path is given or one does not exist.
    """
    if not paths:
        raise InputError("no scans given: name DICOM folders or image files, or give a --manifest")
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    return _collect(paths)


def locations(sources: Sequence[Source]) -> list[Path]:
    """Where each scan lies, absolute: what an id map says. For people only; never to be written to a store.

    An image file itself; the folder of a DICOM series, or its first file if other sources lie in that folder too;
    what the user gave if there is nothing to read.
    """
    folders = [_folder(source.series) if source.series else source.path.resolve() for source in sources]
    return [
        min(source.series.files).resolve() if source.series and folders.count(folder) > 1 else folder
        for source, folder in zip(sources, folders, strict=True)
    ]


def _folder(series: Series) -> Path:
    return Path(os.path.commonpath([file.absolute().parent for file in series.files])).resolve()


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES)


class _Headers:
    """DICOM headers of several given paths: each file is read once, and it is kept by which paths it was found."""

    def __init__(self) -> None:
        self.slices: list[SliceHeader] = []
        self.damaged: list[Damaged] = []
        self.finders: dict[Path, set[int]] = {}
        """File of a slice -> numbers of the given paths that lead to it."""
        self._seen: dict[Path, SliceHeader | Damaged | None] = {}

    def add(self, number: int, files: Iterable[Path]) -> list[SliceHeader | Damaged]:
        """Read the files of given path ``number``; what they are, without those that are no DICOM images."""
        found = {file: file.resolve() for file in files}
        new = {key: read_header(file) for file, key in found.items() if key not in self._seen}  # may raise
        self._seen.update(new)
        self.slices += [header for header in new.values() if isinstance(header, SliceHeader)]
        self.damaged += [header for header in new.values() if isinstance(header, Damaged)]
        headers = [header for header in (self._seen[key] for key in found.values()) if header is not None]
        for header in headers:
            self.finders.setdefault(header.path, set()).add(number)
        return headers


def _collect(paths: Sequence[Path]) -> list[Source]:
    """Image files, problems and studies of each path in turn; a study comes with the first path that leads to it."""
    headers = _Headers()
    result: list[list[Source]] = [[] for _ in paths]
    for number, path in enumerate(paths):
        try:
            files = list(walk_files(path))
            # names with a leading dot: what macOS and killed runs leave beside images
            images = [file for file in files if _is_image(file) and (path.is_file() or not file.name.startswith("."))]
            result[number] += [Source(file) for file in images]
            found = headers.add(number, (file for file in files if not _is_image(file)))
            broken = any(isinstance(header, Damaged) and header.path.stat().st_size > 0 for header in found)
            if not any(isinstance(header, SliceHeader) for header in found) and (broken or not images):
                find_series(path)  # raises, saying what was looked at
        except InputError as error:
            result[number].append(Source(path, problem=str(error)))
    studies: dict[tuple[str, str], list[Series]] = {}
    for series in build_series(headers.slices, headers.damaged):
        studies.setdefault((series.patient_id, series.study_uid), []).append(series)
    for _, group in sorted(studies.items()):
        first = min(min(headers.finders[file]) for series in group for file in series.files)
        result[first].append(_choose(paths[first], group, _copies(group, headers.finders)))
    return [source for sources in result for source in sources]


def _copies(group: Sequence[Series], finders: dict[Path, set[int]]) -> str:
    """Why series of a study cannot be told apart: one of them in two places given separately. '' if there is none."""
    by_uid: dict[object, list[Path]] = {}
    for number, series in enumerate(group):
        by_uid.setdefault(series.series_uid or number, []).extend(series.files)
    for files in by_uid.values():
        here = files[0].parent
        elsewhere = [file.parent for file in files if not finders[file] & finders[files[0]] and file.parent != here]
        # a path that leads to all of them: it was given as one scan. One folder: its files were given one by one
        if elsewhere and not set.intersection(*(finders[file] for file in files)):
            return (
                f"the same series lies in {here} and, with other files, in {elsewhere[0]}: give one of the two, or, if "
                "they are parts of one scan, the folder above both"
            )
    return ""


def _choose(path: Path, group: Sequence[Series], problem: str = "") -> Source:
    if problem:
        return Source(path, problem=problem, patient_id=group[0].patient_id)
    try:
        choice = choose_series(group)
    except InputError as error:
        return Source(path, problem=f"{path}: {error}", patient_id=group[0].patient_id)
    others = tuple(f"series with {len(series.files)} slices not used: {reason}" for series, reason in choice.others)
    return Source(path, choice.chosen, others, patient_id=choice.chosen.patient_id)


def read_manifest(manifest: Path, paths: Iterable[Path] = ()) -> list[Source]:
    """Scans listed in a CSV; with ``paths``, only those at or below them.

    Columns: path (needed; relative to the manifest), series (a SeriesInstanceUID), case_id, patient_id,
    split (train, val, test), reference (label map), inspiration (inspiration, expiration). Any other may be absent.

    Raises
    ------
    InputError
        If the file cannot be read, has unknown columns or values, repeats a case id, or lists nothing.
    """
    chosen = [path.resolve() for path in paths]
    sources = []
    for number, row in _manifest_rows(manifest):
        where = f"{manifest}, line {number}"
        if None in row:
            raise InputError(f"{where}: more values than columns; put a value with a comma into quotes")
        values = {key: (value or "").strip() for key, value in row.items()}
        if not values.get("path"):
            raise InputError(f"{where}: the path is empty")
        path = manifest.parent / values["path"]
        if chosen and not any(root == path.resolve() or root in path.resolve().parents for root in chosen):
            continue
        for key, allowed in (("split", SPLITS), ("inspiration", INSPIRATIONS)):
            if values.get(key, "") not in allowed:
                raise InputError(f"{where}: {key} '{values[key]}' is not one of {', '.join(a for a in allowed if a)}")
        reference = manifest.parent / values["reference"] if values.get("reference") else None
        sources.append(
            replace(
                _listed(path, values.get("series", ""), where),
                case_id=values.get("case_id", ""),
                given_patient_id=values.get("patient_id", ""),
                split=values.get("split", ""),
                reference=reference,
                inspiration=values.get("inspiration", ""),
            )
        )
    names = [source.case_id for source in sources if source.case_id]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{manifest}: case_id {', '.join(repeated)} appears more than once")
    if not sources:
        raise InputError(f"{manifest}: lists no scan" + (" below the given paths" if chosen else ""))
    return sources


def _manifest_rows(manifest: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows with their line numbers (of the last line, where a value spans several)."""
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{manifest}: cannot be read as CSV: {error}") from error
    unknown = [column for column in columns if column not in MANIFEST_COLUMNS]
    if unknown or "path" not in columns:
        problem = f"unknown columns {', '.join(unknown)}" if unknown else "no column 'path'"
        raise InputError(f"{manifest}: {problem}; the columns are {', '.join(MANIFEST_COLUMNS)}")
    return rows


def _listed(path: Path, series_uid: str, where: str) -> Source:
    """The one scan a row names."""
    if not path.exists():
        return Source(path, problem=f"{where}: {path} does not exist")
    if series_uid:
        try:
            found = [s for s in find_series(path).series if s.series_uid == series_uid]
        except InputError as error:
            return Source(path, problem=f"{where}: {error}")
        if not found:
            return Source(path, problem=f"{where}: {path} holds no series {series_uid}")
        return _choose(path, found)
    sources = _collect([path])
    if len(sources) > 1:
        return Source(path, problem=f"{where}: {path} holds {len(sources)} scans; name one file, folder or series")
    return sources[0]
