"""What lies below the given paths: image files, DICOM headers, archives; each file is looked at once.

Whatever cannot be used is told as a problem of its own, so that the rest of a cohort goes on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lungseg.errors import InputError, ResourceError
from lungseg.scan import dicom_headers
from lungseg.scan.archives import START_BYTES, list_members, packed_kind, taken_out
from lungseg.scan.dicom_headers import Damaged, SliceHeader, read_header
from lungseg.scan.dicom_series import MAX_LISTED, Series, build_series

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
MAX_DEPTH = 64
"""Folders inside folders; deeper trees are taken for a mistake or a trap. RELIABILITY 4.8."""
TRASH = (".trash", "$recycle.bin")
"""How folders begin in which a disk keeps what was deleted: nobody means these."""
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
"""An empty file with one of these was meant to be a slice."""


@dataclass(frozen=True)
class Problem:
    """Something below a given path that cannot be used."""

    path: Path
    text: str
    mentioned: tuple[Path, ...] = ()
    """Further files that the text names."""


@dataclass(frozen=True)
class _Entry:
    """One file or member, looked at once."""

    path: Path
    kind: str
    """image, dicom, damaged, packed, skipped."""
    header: SliceHeader | Damaged | None = None
    text: str = ""
    """Of 'packed': how such an archive is called."""


@dataclass
class Inventory:
    """What the given paths hold; ``look`` adds one path."""

    slices: list[SliceHeader] = field(default_factory=list)
    damaged: list[Damaged] = field(default_factory=list)
    images: list[list[Path]] = field(default_factory=list)
    """Of each given path, in order; one that several paths lead to comes with the first of them."""
    problems: list[list[Problem]] = field(default_factory=list)
    """Of each given path."""
    finders: dict[Path, set[int]] = field(default_factory=dict)
    """File of a slice -> numbers of the given paths that lead to it."""
    archives: list[Path] = field(default_factory=list)
    """Zip archives that were opened."""
    looked_at: int = 0
    skipped: list[Path] = field(default_factory=list)
    """Neither DICOM images nor image files."""
    _seen: dict[Path, tuple[_Entry, ...]] = field(default_factory=dict)
    """Resolved file -> what it is; of an archive, what its members are."""
    _entries: list[list[_Entry]] = field(default_factory=list)
    """Below each given path."""
    _failed: dict[Path, Problem] = field(default_factory=dict)
    """Resolved archive -> why it could not be opened."""

    def look(self, path: Path) -> None:
        """Add one given path, a folder or a file."""
        number = len(self.images)
        self.images.append([])
        self.problems.append([])
        self._entries.append([])
        try:
            files = list(_walk(path, self.problems[number]))
        except InputError as error:
            self.problems[number].append(Problem(path, str(error)))
            return
        for file, key in files:
            new = key not in self._seen
            if new:
                self._seen[key] = self._examine(file, key, given=file == path)
            if key in self._failed:
                self._problem(number, self._failed[key])
            for entry in self._seen[key]:
                if isinstance(entry.header, SliceHeader):
                    self.finders.setdefault(entry.path, set()).add(number)
                if new:
                    self._count(entry, number)
            self._entries[number] += self._seen[key]

    def finish(self, paths: Sequence[Path]) -> None:
        """After the last path: tell of folders with nothing but damaged files, and of paths without any scan."""
        alive = {header.path.parent for header in self.slices}
        for number, path in enumerate(paths):
            entries = self._entries[number]
            counts = Counter(entry.path.parent for entry in entries)
            lost: dict[Path, list[Damaged]] = {}
            for bad in (entry.header for entry in entries if isinstance(entry.header, Damaged)):
                if bad.path.parent not in alive and _was_a_slice(bad):
                    lost.setdefault(bad.path.parent, []).append(bad)
            for folder, broken in lost.items():
                self._problem(number, _nothing(folder, counts[folder], broken))
            for problem in _packed(entries):
                self._problem(number, problem)
            useful = lost or any(entry.kind in ("image", "dicom", "packed") for entry in entries)
            if not useful and not self.problems[number]:
                broken = [entry.header for entry in entries if isinstance(entry.header, Damaged)]
                self._problem(number, _nothing(path, len(entries), broken))

    def _problem(self, number: int, problem: Problem) -> None:
        """Keep a problem; of one place it is told once, whichever paths lead there."""
        if not any(problem.path == known.path for problems in self.problems for known in problems):
            self.problems[number].append(problem)

    def series(self) -> tuple[Series, ...]:
        """Series of all slices found."""
        return build_series(self.slices, self.damaged)

    def beside(self, series: Sequence[Series]) -> tuple[Path, ...]:
        """Damaged files in the folders of these series: their problems name them."""
        folders = {file.parent for one in series for file in one.files}
        return tuple(bad.path for bad in self.damaged if bad.path.parent in folders)

    def archives_of(self, files: Sequence[Path]) -> tuple[Path, ...]:
        """Archives that some of these files are members of."""
        parents = {parent for folder in {file.parent for file in files} for parent in (folder, *folder.parents)}
        return tuple(archive for archive in self.archives if archive in parents)

    def _examine(self, file: Path, key: Path, *, given: bool) -> tuple[_Entry, ...]:
        if _is_image(file, given=given):
            return (_Entry(file, "image"),)
        try:
            with file.open("rb") as stream:
                start = stream.read(START_BYTES)
            kind = packed_kind(file, start)
            if kind == "zip":
                return self._examine_archive(file, key)
            return (_entry(file, file, kind),)
        except OSError as error:
            reason = f"unreadable (errno {error.errno}: {error.strerror})"
            return (_Entry(file, "damaged", Damaged(file, reason)),)

    def _examine_archive(self, file: Path, key: Path) -> tuple[_Entry, ...]:
        entries: list[_Entry] = []
        try:
            members = list_members(file)
            entries += [_Entry(member.path, "image") for member in members if _is_image(member.path, given=False)]
            images = {entry.path for entry in entries}
            if len(images) < len(members):
                with taken_out(file, images) as rest:
                    entries += [_member_entry(member.path, real) for member, real in rest]
        except (InputError, ResourceError) as error:
            self._failed[key] = Problem(file, str(error))
            return ()
        self.archives.append(file)
        nested = [entry.path for entry in entries if entry.kind == "packed"]
        if nested:
            text = f"{file}: holds {len(nested)} archives that were not opened: unpack it and give the folder"
            self._failed[key] = Problem(file, text, tuple(nested))
        return tuple(replace(entry, kind="skipped") if entry.kind == "packed" else entry for entry in entries)

    def _count(self, entry: _Entry, number: int) -> None:
        self.looked_at += 1
        if entry.kind == "image":
            self.images[number].append(entry.path)
        elif isinstance(entry.header, SliceHeader):
            self.slices.append(entry.header)
        elif isinstance(entry.header, Damaged):
            self.damaged.append(entry.header)
        elif entry.kind == "skipped":
            self.skipped.append(entry.path)


def _nothing(path: Path, looked_at: int, broken: Sequence[Damaged]) -> Problem:
    listed = "".join(f"; {bad.path}: {bad.reason}" for bad in broken[:MAX_LISTED])
    more = f"; {len(broken) - MAX_LISTED} more damaged" if len(broken) > MAX_LISTED else ""
    text = (
        f"{path}: no readable DICOM image among the {looked_at} files looked at{listed}{more}. Give the folder of a CT "
        "series, a zip archive of it, or a .nii.gz, .nrrd or .mha file"
    )
    return Problem(path, text, tuple(bad.path for bad in broken[:MAX_LISTED]))


def _was_a_slice(bad: Damaged) -> bool:
    """Whether a damaged file is more than an empty file of any name."""
    return not bad.reason.startswith("empty") or bad.path.suffix.lower() in DICOM_SUFFIXES


def _is_image(path: Path, *, given: bool) -> bool:
    # names with a leading dot: what macOS and killed runs leave beside images
    return path.name.lower().endswith(IMAGE_SUFFIXES) and (given or not path.name.startswith("."))


def _member_entry(member: Path, real: Path | None) -> _Entry:
    if real is None:
        return _Entry(member, "damaged", Damaged(member, "damaged in its archive"))
    with real.open("rb") as stream:
        start = stream.read(START_BYTES)
    if member.name.upper() == "DICOMDIR":
        return _Entry(member, "skipped")
    return _entry(member, real, packed_kind(member, start))


def _packed(entries: Sequence[_Entry]) -> list[Problem]:
    """Archives that are not opened, one by one; compressed slices by folder."""
    advice = "unpack it first and give the folder, or leave it out"
    problems: list[Problem] = []
    slices: dict[tuple[Path, str], list[Path]] = {}
    for entry in entries:
        if entry.kind == "packed" and entry.text.endswith("DICOM"):
            slices.setdefault((entry.path.parent, entry.text), []).append(entry.path)
        elif entry.kind == "packed":
            problems.append(Problem(entry.path, f"{entry.path}: a {entry.text} archive is not opened: {advice}"))
    for (folder, kind), files in slices.items():
        text = f"{folder}: {len(files)} {kind} files are not opened: unpack them first, or leave them out"
        problems.append(Problem(folder, text))
    return problems


def _entry(path: Path, real: Path, kind: str | None) -> _Entry:
    """What a file is, called ``path``, that can be opened as ``real``."""
    if kind:
        return _Entry(path, "packed", text=kind)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return _Entry(path, "skipped")
    try:
        header = read_header(real)
    except InputError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        header = Damaged(path, f"unreadable (errno {cause.errno}: {cause.strerror})")
    if header is None:
        return _Entry(path, "skipped")
    if path != real:
        header = replace(header, path=path)
    return _Entry(path, "dicom" if isinstance(header, SliceHeader) else "damaged", header)


def _is_lost(child: os.DirEntry[str]) -> bool:
    """Whether this is a link to a scan or slice that is gone, as in a data set that was not fetched completely."""
    named_so = child.name.lower().endswith((*IMAGE_SUFFIXES, *DICOM_SUFFIXES)) and not child.name.startswith(".")
    return named_so and child.is_symlink() and not os.path.exists(child.path)


def _walk(top: Path, problems: list[Problem]) -> Iterator[tuple[Path, Path]]:
    """Regular files below ``top`` in sorted order with their resolved paths; each folder is entered once.

    A folder that cannot be listed, or lies too deep, is told in ``problems``; the walk goes on. Links to nothing are
    left out, but for those named like a scan or slice: their content is missing.
    """
    if top.is_file():
        yield top, top.resolve()
        return
    entered: set[tuple[int, int]] = set()
    waiting = [(top, top.resolve(), 0)]
    count = 0
    while waiting:
        folder, resolved, depth = waiting.pop()
        try:
            info = os.stat(folder)
            if (info.st_dev, info.st_ino) in entered:  # a symbolic link back to where we were
                continue
            entered.add((info.st_dev, info.st_ino))
            if depth > MAX_DEPTH:
                problems.append(Problem(folder, f"{folder}: more than {MAX_DEPTH} folders deep; give a folder below"))
                continue
            with os.scandir(folder) as listing:
                children = sorted(listing, key=lambda child: child.name)
        except OSError as error:
            text = f"{folder}: cannot be listed (errno {error.errno}: {error.strerror}); allow it, or leave it out"
            problems.append(Problem(folder, text))
            continue
        inner = []
        for child in children:
            path = folder / child.name
            try:
                there = path.resolve() if child.is_symlink() else resolved / child.name
                if child.is_dir():
                    if child.name.lower().startswith(TRASH):
                        continue
                    inner.append((path, there, depth + 1))
                elif child.is_file() or _is_lost(child):  # never a pipe or device: opening one could wait for ever
                    count += 1
                    if count > dicom_headers.MAX_FILES:
                        limit = dicom_headers.MAX_FILES
                        raise InputError(f"{top}: more than {limit} files; give the folder of one study or cohort")
                    yield path, there
            except (OSError, RuntimeError):
                continue  # a link to itself: no file
        waiting += reversed(inner)
