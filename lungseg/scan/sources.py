"""Which files form a case: folders, archives, files and manifests become a list of scans to read, each one patient's.

Decided once, here, before anything is read: one case per DICOM study (its best chest series, or the one the user
names), one per image file.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.archives import local_files, member_sizes
from lungseg.scan.dicom import Series, choose_series, read_series
from lungseg.scan.discovery import IMAGE_SUFFIXES, Inventory, Problem
from lungseg.scan.nifti import read_image
from lungseg.scan.privacy import hide_names
from lungseg.scan.volume import Volume, extent_problem

__all__ = ["IMAGE_SUFFIXES", "Candidate", "Search", "Source", "find_sources", "locations", "read_manifest", "search",
           "voxel_digest"]  # fmt: skip

MANIFEST_COLUMNS = ("path", "series", "case_id", "patient_id", "split", "reference", "inspiration")
SPLITS = ("", "train", "val", "test")
INSPIRATIONS = ("", "inspiration", "expiration")
MIN_KEY_DIGITS = 6
"""First digits of a series key that stand for it, if no other series begins with them."""
MAX_KEYS = 20
"""Series keys listed in a message before it says how many more there are."""
MAX_EXAMPLES = 5
"""Skipped files named in a report. RELIABILITY row 2."""


@dataclass(frozen=True)
class Candidate:
    """One series of a study, for a listing."""

    series: Series
    chosen: bool
    reason: str
    """Why it was chosen, or why not. May name files: pass it through ``Source.hide`` before it is shown."""


@dataclass(frozen=True)
class Source:
    """One scan to read, or the reason why it cannot be."""

    path: Path
    """What the user gave, or the image file or part of it. Never written to an artefact: names hold patient names."""
    series: Series | None = None
    """Chosen DICOM series; None for an image file."""
    others: tuple[str, ...] = ()
    """Series of the study that were not used, and why; without names."""
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
    candidates: tuple[Candidate, ...] = ()
    """All series of the study, the chosen one first; empty for an image file."""
    archives: tuple[Path, ...] = ()
    """Zip archives that files of this scan lie in; such files are named ARCHIVE/member."""
    mentioned: tuple[Path, ...] = ()
    """Further files that ``problem`` may name."""

    def hide(self, text: str) -> str:
        """``text`` without any path, file, folder or archive name of this scan, nor patient id: for tables, JSON, logs.

        Errors on the terminal may name the file; whatever is kept or passed on may not. See
        :func:`lungseg.scan.privacy.hide_names` for what counts as a name.
        """
        places: dict[Path, str] = {}
        for candidate in self.candidates:
            called = "file" if candidate.chosen else "another series, file"
            for number, file in enumerate(candidate.series.files, start=1):
                places.setdefault(file, f"{called} {number}")
        places |= dict.fromkeys(self.archives, "the archive")
        places |= {file: f"another file ({number})" for number, file in enumerate(self.mentioned, start=1)}
        places[self.path] = "this scan"
        if self.reference:
            places[self.reference] = "the reference"
        words = {candidate.series.series_uid: f"series {candidate.series.key}" for candidate in self.candidates}
        words |= {candidate.series.study_uid: "this study" for candidate in self.candidates}
        if self.candidates:  # else it is a hash, or what the manifest says
            words[self.candidates[0].series.patient_id] = "this patient"
        return hide_names(text, places, words)

    def key(self) -> str:
        """What tells this scan from another one without reading its voxels; '' if nothing does (no series UID).

        The same for a folder and for an archive of it.
        """
        if self.series is None or not self.series.series_uid:
            return ""
        files = dict.fromkeys(self.series.files)  # a multi-frame file holds several slices
        size = sum(member_sizes(list(files), self.archives).values())
        return f"{self.series.series_uid}/{len(files)}/{size}"

    def read(self, options: ReadOptions = ReadOptions()) -> Volume:
        """The volume; ``InputError`` if it cannot be read as one. Members of archives are taken out meanwhile."""
        if self.problem:
            raise InputError(self.problem)
        files = (self.path,) if self.series is None else self.series.files
        with local_files(files, self.archives) as real:
            if self.series is None:
                volume = read_image(real[self.path], options)
                for count, extent_mm in zip(volume.geometry.shape, volume.geometry.extent_mm, strict=True):
                    if problem := extent_problem(count, extent_mm):
                        raise InputError(f"{self.path}: {problem}")
                return volume
            return read_series(replace(self.series, files=tuple(real[file] for file in files)), options)


@dataclass(frozen=True)
class Search:
    """What was found below the given paths."""

    sources: tuple[Source, ...]
    looked_at: int
    """Files and archive members looked at."""
    skipped: int
    """Those that are neither DICOM images nor image files."""
    examples: tuple[Path, ...]
    """The first five of the skipped ones; their names are private."""
    damaged: int
    """DICOM files that cannot be read."""
    archives: int
    """Zip archives looked into."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The counts in words, without names."""
        counts = (
            (self.archives, "zip archives looked into"),
            (self.skipped, "files skipped that are neither DICOM images nor image files"),
            (self.damaged, "damaged or unreadable DICOM files"),
        )
        return tuple(f"{count} {what}" for count, what in counts if count)


def voxel_digest(volume: Volume) -> bytes:
    """SHA-256 of voxels and grid: identifies an image file that has no series UID."""
    digest = hashlib.sha256(repr(volume.geometry).encode())
    digest.update(volume.array.data)
    return digest.digest()


def find_sources(
    paths: Sequence[Path], *, options: ReadOptions = ReadOptions(), series: Sequence[str] = ()
) -> list[Source]:
    """Scans under the given folders and files, in a fixed order; a bad one is listed with its problem.

    A study is one case, however many of the paths hold parts of it; files reached by several paths count once.

    Parameters
    ----------
    paths : sequence of Path
        DICOM folders (searched recursively, may hold many studies), zip archives, image files, or folders of these.
    options : ReadOptions
        What may be repaired: decides which series can be chosen.
    series : sequence of str
        Series to be used in their studies: keys (or their first six digits and more) or SeriesInstanceUIDs. Studies in
        which none of them lies keep the usual choice.

    Raises
    ------
    InputError
        If no path is given or one does not exist; if a named series is found nowhere, is not unique, or two of one
        study are named.
    """
    return list(search(paths, options=options, series=series).sources)


def search(paths: Sequence[Path], *, options: ReadOptions = ReadOptions(), series: Sequence[str] = ()) -> Search:
    """What ``find_sources`` finds, with the counts of what was looked at. Parameters and errors are the same."""
    if not paths:
        raise InputError("no scans given: name DICOM folders, zip archives or image files, or give a --manifest")
    for path in paths:
        if not _exists(path):
            raise InputError(f"{path}: no such file or folder")
    inventory = _take_inventory(paths)
    sources = _sources(inventory, paths, options, series)
    skipped = inventory.skipped
    return Search(
        tuple(sources), inventory.looked_at, len(skipped), tuple(skipped[:MAX_EXAMPLES]), len(inventory.damaged),
        len(inventory.archives),
    )  # fmt: skip


def locations(sources: Sequence[Source]) -> list[Path]:
    """Where each scan lies, absolute: what an id map says. For people only; never to be written to a store.

    An image file itself; the folder of a DICOM series, or its first file if other sources lie in that folder too;
    what the user gave if there is nothing to read. Places inside an archive begin with the archive's name.
    """
    folders = [_folder(source.series) if source.series else source.path.resolve() for source in sources]
    return [
        min(source.series.files).resolve() if source.series and folders.count(folder) > 1 else folder
        for source, folder in zip(sources, folders, strict=True)
    ]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long for the file system, or a folder that may not be entered
        raise InputError(f"{path}: cannot be reached (errno {error.errno}: {error.strerror})") from error


def _folder(series: Series) -> Path:
    return Path(os.path.commonpath([file.absolute().parent for file in series.files])).resolve()


def _take_inventory(paths: Sequence[Path]) -> Inventory:
    inventory = Inventory()
    for path in paths:
        inventory.look(path)
    inventory.finish(paths)
    return inventory


def _sources(
    inventory: Inventory, paths: Sequence[Path], options: ReadOptions, wanted: Sequence[str] = ()
) -> list[Source]:
    """Image files, problems and studies of each path in turn; a study comes with the first path that leads to it."""
    result: list[list[Source]] = []
    for images, problems in zip(inventory.images, inventory.problems, strict=True):
        result.append([Source(image, archives=inventory.archives_of([image])) for image in images])
        result[-1] += [_problem_source(problem) for problem in problems]
    found = inventory.series()
    asked_for = _named(found, wanted) if wanted else []
    for study in _studies(found):
        first = min(min(inventory.finders[file]) for series in study for file in series.files)
        copies = _copies(study, inventory.finders)
        result[first].append(_choose(paths[first], study, inventory, options, asked_for, copies))
    return [source for sources in result for source in sources]


def _problem_source(problem: Problem) -> Source:
    return Source(problem.path, problem=problem.text, mentioned=problem.mentioned)


def _studies(found: Sequence[Series]) -> list[list[Series]]:
    """Series by patient and study; where the study UID is missing, by patient and folder."""
    studies: dict[tuple[str, str, str], list[Series]] = {}
    for series in found:
        folder = "" if series.study_uid else str(_folder(series))
        studies.setdefault((series.patient_id, series.study_uid, folder), []).append(series)
    return [group for _, group in sorted(studies.items())]


def _named(found: Sequence[Series], names: Sequence[str]) -> list[Series]:
    """The series that keys, first digits of keys, or series UIDs stand for.

    Raises
    ------
    InputError
        If one stands for none, or digits for several; with the keys there are.
    """
    result: list[Series] = []
    for name in (name.strip() for name in names):
        digits = name.lower()
        is_key = len(digits) >= MIN_KEY_DIGITS and re.fullmatch("[0-9a-f]+", digits) is not None
        matches = [s for s in found if (s.series_uid and s.series_uid == name) or (is_key and s.key.startswith(digits))]
        keys = sorted({series.key for series in found})
        if not matches:
            more = f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
            there = f"there are {', '.join(keys[:MAX_KEYS])}{more}" if keys else "there is no DICOM series"
            raise InputError(
                f"series '{name}' was not found: {there}. Give a key of at least 6 digits, or a series UID"
            )
        if len({series.series_uid or series.key for series in matches}) > 1 and name not in {s.key for s in matches}:
            several = ", ".join(sorted({series.key for series in matches}))
            raise InputError(f"series '{name}' may be any of {several}: give more digits")
        result += matches
    return result


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


def _choose(
    path: Path,
    study: Sequence[Series],
    inventory: Inventory,
    options: ReadOptions,
    asked_for: Sequence[Series] = (),
    problem: str = "",
) -> Source:
    """The case of one study; ``asked_for`` may hold series of other studies too."""
    files = [file for series in study for file in series.files]
    source = Source(
        path,
        patient_id=study[0].patient_id,
        archives=inventory.archives_of(files),
        mentioned=inventory.beside(study),
    )
    named = [series for series in study if any(series is one for one in asked_for)]
    if len({series.series_uid or series.key for series in named}) > 1:
        keys = " and ".join(sorted({series.key for series in named}))
        raise InputError(f"series {keys} lie in one study, which is one case: name one, or list both in a --manifest")
    rest = [series for series in study if named and series not in named]
    try:
        choice = choose_series(named or study, options)
    except InputError as error:
        problem = problem or f"{path}: {error}"
        reasons = [(series, series.refusal(options) or "") for series in named or study]
        refused = [*reasons, *((series, "another series was asked for") for series in rest)]
        return replace(source, problem=problem, candidates=_candidates(refused))
    others = [*choice.others, *((series, "another series was asked for") for series in rest)]
    if problem:
        return replace(source, problem=problem, candidates=_candidates([(choice.chosen, problem), *others]))
    if named:
        why = "asked for"
    elif sum(series.refusal(options) is None for series in study) == 1:
        why = "the only one of its study that can be read" if others else "the only one of its study"
    else:
        why = "first in order of coverage, spacing, kernel and number of slices"
    source = replace(
        source, series=choice.chosen, candidates=(Candidate(choice.chosen, True, why), *_candidates(others))
    )
    told = tuple(f"series {s.key} with {len(s.files)} slices not used: {reason}" for s, reason in others)
    return replace(source, others=tuple(source.hide(text) for text in told))


def _candidates(refused: Iterable[tuple[Series, str]]) -> tuple[Candidate, ...]:
    return tuple(Candidate(series, False, reason) for series, reason in refused)


def read_manifest(manifest: Path, paths: Iterable[Path] = (), *, options: ReadOptions = ReadOptions()) -> list[Source]:
    """Scans listed in a CSV; with ``paths``, only those at or below them.

    Columns: path (needed; relative to the manifest), series (a key or SeriesInstanceUID, as for ``find_sources``),
    case_id, patient_id, split (train, val, test), reference (label map), inspiration (inspiration, expiration). Any
    other may be absent.

    Raises
    ------
    InputError
        If the file cannot be read, has unknown columns or values, repeats a case id, or lists nothing.
    """
    chosen = [path.resolve() for path in paths]
    sources = []
    known: dict[Path, Inventory] = {}
    for number, row in _manifest_rows(manifest):
        where = f"{manifest}, line {number}"
        if None in row:
            raise InputError(f"{where}: more values than columns; put a value with a comma into quotes")
        values = {key: (value or "").strip() for key, value in row.items()}
        if any("\0" in value for value in values.values()):
            raise InputError(f"{where}: holds a NUL character; save the table as plain CSV")
        if not values.get("path"):
            raise InputError(f"{where}: the path is empty")
        path = manifest.parent / values["path"]
        if chosen and not any(root == path.resolve() or root in path.resolve().parents for root in chosen):
            continue
        for key, allowed in (("split", SPLITS), ("inspiration", INSPIRATIONS)):
            if values.get(key, "") not in allowed:
                raise InputError(f"{where}: {key} '{values[key]}' is not one of {', '.join(a for a in allowed if a)}")
        reference = manifest.parent / values["reference"] if values.get("reference") else None
        source = _listed(path, values.get("series", ""), where, options, known)
        sources.append(
            replace(
                source,
                mentioned=(*source.mentioned, manifest),
                case_id=values.get("case_id", ""),
                given_patient_id=values.get("patient_id", ""),
                split=values.get("split", ""),
                reference=reference,
                inspiration=values.get("inspiration", ""),
            )
        )
    names = [source.case_id.casefold() for source in sources if source.case_id]  # one folder on some systems
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


def _listed(path: Path, series_name: str, where: str, options: ReadOptions, known: dict[Path, Inventory]) -> Source:
    """The one scan a row names; ``known`` keeps what each path holds, since rows may share one."""
    if not _exists(path):
        return Source(path, problem=f"{where}: {path} does not exist")
    if path not in known:
        known[path] = _take_inventory([path])
    inventory = known[path]
    if not series_name:
        sources = _sources(inventory, [path], options)
        if len(sources) > 1:
            return Source(path, problem=f"{where}: {path} holds {len(sources)} scans; name one file, folder or series")
        return sources[0]
    found = inventory.series()
    try:
        asked_for = _named(found, [series_name])
    except InputError as error:
        return Source(path, problem=f"{where}: {path}: {error}")
    studies = [study for study in _studies(found) if any(series is one for series in study for one in asked_for)]
    if len(studies) > 1:
        return Source(
            path, problem=f"{where}: series {series_name} lies in {len(studies)} studies; name a folder of one"
        )
    return _choose(path, studies[0], inventory, options, asked_for)
