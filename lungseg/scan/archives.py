"""Zip archives as folders of scans: every member is checked, named by us, and taken out one at a time.

A member is spoken of as ``ARCHIVE/folder/name``, a path that exists nowhere: it is only ever a name for people and for
grouping. What is taken out lies in a private folder under names made here, and is gone when the block ends.
"""

from __future__ import annotations

import bz2
import hashlib
import itertools
import lzma
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lungseg.errors import InputError, ResourceError
from lungseg.scan.private_folder import private_folder

MAX_MEMBERS = 200_000
"""Entries of one archive before it is taken for a mistake or an attack; as many as files below one folder."""
MAX_DIRECTORY_BYTES = 48 << 20
"""Largest central directory that is parsed: 200,000 entries with long names. zipfile holds it in memory as objects."""
MAX_RATIO = 100
"""Bytes taken out of an archive for each byte it has. RELIABILITY 4.2."""
ALLOWANCE_BYTES = 64 << 20
"""Taken out whatever the ratio: a few blank images compress a thousandfold."""
RESERVE_BYTES = 512 << 20
"""Left free on the disk of the temporary folder: other programs need it too."""
START_BYTES = 512
"""First bytes of a file that tell its kind: the magic of tar lies at 257, that of DICOM at 128."""
_BLOCK_BYTES = 1 << 20
_MAX_COMPONENT = 100
_MAX_NAME = 1000
"""Longer names of members are shortened: the paths made of them go through functions of the file system."""
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_FOREIGN_STARTS = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar"}
_FOREIGN_SUFFIXES = {".tar": "tar", ".tgz": "tar.gz", ".tbz2": "tar.bz2", ".txz": "tar.xz", ".tzst": "tar.zst",
                     ".tar.gz": "tar.gz", ".tar.bz2": "tar.bz2", ".tar.xz": "tar.xz", ".tar.zst": "tar.zst",
                     ".7z": "7z", ".rar": "rar"}  # fmt: skip
_DOCUMENT_SUFFIXES = (".docx", ".docm", ".xlsx", ".xlsm", ".pptx", ".odt", ".ods", ".odp", ".epub", ".jar", ".apk",
                      ".whl", ".npz", ".pt", ".pth", ".kmz", ".mrb", ".xpi", ".nupkg", ".keras")  # fmt: skip
"""Documents and programs that are zip archives inside and hold no scans of a cohort."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, ValueError, IndexError, KeyError,
           OverflowError)  # fmt: skip
"""What zipfile raises for archives that are no archives; UnicodeDecodeError is a ValueError."""


@dataclass(frozen=True)
class Member:
    """One file of a zip archive that has passed the checks."""

    path: Path
    """``ARCHIVE/folder/name``: unique in the archive, the same each time it is listed."""
    index: int
    """Its place in the archive's directory."""
    size: int
    """Bytes it says it has."""


def packed_kind(path: Path, start: bytes) -> str | None:
    """'zip'; the name of another kind of archive ('tar.gz', '7z', ...), which is not opened; None for other files.

    Parameters
    ----------
    path : Path
        Its suffix counts where content alone does not tell.
    start : bytes
        The first ``START_BYTES`` of the file, or all of a shorter one.
    """
    name = path.name.lower()
    if start[128:132] == b"DICM" or name.endswith(_DOCUMENT_SUFFIXES):
        return None  # a DICOM preamble may hold anything, the first bytes of a zip too
    if start.startswith(_ZIP_STARTS) or name.endswith(".zip"):
        return "zip"
    for magic, kind in _FOREIGN_STARTS.items():
        if start.startswith(magic):
            return kind
    if start[257:262] == b"ustar":
        return "tar"
    for suffix, kind in _FOREIGN_SUFFIXES.items():
        if name.endswith(suffix) and start:
            return kind
    inner, compression = _unpacked_start(start)
    if inner[257:262] == b"ustar":
        return f"tar.{compression}"
    return f"{compression}-compressed DICOM" if inner[128:132] == b"DICM" else None


def _unpacked_start(start: bytes) -> tuple[bytes, str]:
    """First bytes inside a compressed file, as far as its own first bytes reach, and the kind of compression."""
    try:
        if start.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(wbits=31).decompress(start, START_BYTES), "gz"
        if start.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(start, START_BYTES), "bz2"
        if start.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor().decompress(start, START_BYTES), "xz"
    except (OSError, zlib.error, lzma.LZMAError, EOFError):
        pass  # not what its first bytes say: some other file
    return b"", ""


def list_members(archive: Path) -> tuple[Member, ...]:
    """Files of a zip archive, without folders and the resource forks of macOS; nothing is taken out.

    Raises
    ------
    InputError
        If it cannot be read, is damaged or encrypted, or holds what could do harm: absolute names, '..', links or
        devices, too many entries, or contents that say they are more than 100 times its size.

    Source
    ------
    RELIABILITY 4.2.
    """
    with _opened(archive) as opened:
        return _members(opened, archive)


@contextmanager
def taken_out(archive: Path, leave: Collection[Path] = ()) -> Iterator[Iterator[tuple[Member, Path | None]]]:
    """Each member in turn with the file it was taken out to, which is removed when the next one is asked for.

    None stands for a member whose data are damaged. Only ``START_BYTES`` of a member are taken out if these show that
    it is neither DICOM nor an archive. Members in ``leave`` are passed over.

    Raises
    ------
    InputError, ResourceError
        As ``list_members`` and ``local_files`` do.
    """
    with _opened(archive) as opened, private_folder() as folder:
        yield _one_by_one(opened, archive, folder, leave)


def _one_by_one(
    opened: zipfile.ZipFile, archive: Path, folder: Path, leave: Collection[Path]
) -> Iterator[tuple[Member, Path | None]]:
    budget, infos = _Budget(archive), opened.infolist()
    for member in _members(opened, archive):
        if member.path in leave:
            continue
        target = folder / _own_name(member, 1)
        try:
            _take_out(opened, infos[member.index], target, budget, peek=member.path)
            whole = True
        except _DamagedError:
            whole = False
        try:
            yield member, target if whole else None
        finally:
            target.unlink(missing_ok=True)


@contextmanager
def local_files(files: Sequence[Path], archives: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Where each of ``files`` can be opened: members of ``archives`` are taken out for the length of the block.

    Errors raised in the block name the members and not the temporary files.

    Parameters
    ----------
    files : sequence of Path
        Files, and names of members as ``list_members`` gives them.
    archives : sequence of Path
        The archives those members lie in.

    Raises
    ------
    InputError
        If an archive is damaged, harmful (see ``list_members``), or no longer holds a member.
    ResourceError
        If the disk of the temporary folder has not enough room.
    """
    inside: dict[Path, list[Path]] = {}
    real = {file: file for file in files}
    for file in real:
        for archive in archives:
            if archive in file.parents:
                inside.setdefault(archive, []).append(file)
                break
    if not inside:
        yield real
        return
    numbers = itertools.count(1)
    with private_folder() as folder:
        for archive, wanted in inside.items():
            with _opened(archive) as opened:
                members = {member.path: member for member in _members(opened, archive)}
                gone = [file for file in wanted if file not in members]
                if gone:
                    raise InputError(f"{archive}: has changed since it was looked at; {gone[0].name} is gone")
                _check_room(folder, sum(members[file].size for file in wanted), archive)
                budget, infos = _Budget(archive), opened.infolist()
                for file in wanted:
                    real[file] = folder / _own_name(members[file], next(numbers))
                    _take_out(opened, infos[members[file].index], real[file], budget)
        try:
            yield real
        except (InputError, ResourceError) as error:
            raise type(error)(_with_member_names(str(error), real)) from error


def member_sizes(files: Sequence[Path], archives: Sequence[Path]) -> dict[Path, int]:
    """Bytes of each file, of members as the archive states them.

    Raises
    ------
    InputError
        As ``list_members`` does, or if a file is gone.
    """
    known = {member.path: member.size for archive in archives for member in list_members(archive)}
    sizes = {}
    for file in files:
        try:
            sizes[file] = known[file] if file in known else file.stat().st_size
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); it has changed since it was found") from error
    return sizes


def _with_member_names(text: str, real: dict[Path, Path]) -> str:
    for member, file in real.items():
        if member != file:
            text = text.replace(str(file), str(member)).replace(file.name, member.name)
    return text


class _DamagedError(InputError):
    """The data of an archive or of one member contradict themselves."""


@contextmanager
def _told(archive: Path) -> Iterator[None]:
    """Everything that zipfile raises as an ``InputError`` that names the archive."""
    try:
        yield
    except NotImplementedError as error:  # Deflate64 of the Windows Explorer, for instance
        raise InputError(f"{archive}: packed in a way that cannot be read ({error}); unpack it first") from error
    except RuntimeError as error:
        raise InputError(f"{archive}: encrypted; unpack it with its password first") from error
    except _DAMAGE as error:  # its text names members, whose names are private
        raise _DamagedError(f"{archive}: damaged or no zip archive; copy it again, or unpack what is sound") from error
    except OSError as error:
        reason = f"errno {error.errno}: {error.strerror}" if error.errno else str(error)
        raise InputError(f"{archive}: cannot be read ({reason})") from error


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    with _told(archive):
        stream = archive.open("rb")
    with stream:
        with _told(archive):
            _check_directory(stream, archive)
            opened = zipfile.ZipFile(stream)
        with opened:
            yield opened


def _check_directory(stream: IO[bytes], archive: Path) -> None:
    """Refuse a directory too large to be parsed: zipfile would hold all of it in memory first. APPNOTE 4.3.14-16."""
    end = stream.seek(0, 2)
    tail_start = max(0, end - 65557 - 20)  # the longest comment, the end record, and the locator before it
    stream.seek(tail_start)
    tail = stream.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise InputError(f"{archive}: truncated, damaged or no zip archive; copy it again")
    entries, size = struct.unpack_from("<HI", tail, at + 10)
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # zip64: the true numbers stand in another record
        stream.seek(min(struct.unpack_from("<Q", tail, at - 12)[0], end))
        record = stream.read(56)
        if len(record) == 56 and record[:4] == b"PK\x06\x06":
            entries, size = struct.unpack_from("<QQ", record, 32)
    stream.seek(0)
    if entries > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise InputError(f"{archive}: more than {MAX_MEMBERS} entries; pack one study or patient into an archive")


def _members(opened: zipfile.ZipFile, archive: Path) -> tuple[Member, ...]:
    infos = opened.infolist()
    if len(infos) > MAX_MEMBERS:
        raise InputError(f"{archive}: more than {MAX_MEMBERS} entries; pack one study or patient into an archive")
    members: list[Member] = []
    taken: dict[Path, int] = {}
    for index, info in enumerate(infos):
        parts = [part for part in re.split(r"[/\\]", info.filename) if part not in ("", ".")]
        _refuse_harmful(info, parts, f"{archive}: entry {index + 1}")
        if info.is_dir() or info.filename.endswith("\\") or not parts:
            continue
        if "__MACOSX" in parts or parts[-1].startswith("._"):
            continue
        path = archive / _plain(parts, index)
        first = path
        while path in taken:  # one name twice: a member added again, or names cut short by the packer; both are read
            taken[first] += 1
            path = archive / _plain([*parts[:-1], f"{taken[first]}-{parts[-1]}"], index)
        taken[path] = 1
        members.append(Member(path, index, info.file_size))
    total = sum(member.size for member in members)
    _Budget(archive).spend(total)
    return tuple(members)


def _refuse_harmful(info: zipfile.ZipInfo, parts: Sequence[str], where: str) -> None:
    advice = "such an archive is not opened; unpack it with care and give the folder"
    if info.filename.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", info.filename) or ".." in parts:
        raise InputError(f"{where} has a name that leads out of its folder: {advice}")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise InputError(f"{where} is a link or device, no file: {advice}")
    if info.flag_bits & 0x1:
        raise InputError(f"{where} is encrypted: unpack the archive with its password first")


def _plain(parts: Sequence[str], index: int) -> Path:
    """A member's name as a relative path without control characters and of a length that any function takes."""
    short = []
    for part in parts:
        name = "".join(c if c.isprintable() else "_" for c in part)
        if len(name.encode("utf-8", "replace")) > _MAX_COMPONENT:
            digest = hashlib.sha256(part.encode("utf-8", "replace")).hexdigest()[:8]
            name = f"{name[:20]}~{digest}{_suffix(name)}"
        short.append(name)
    path = Path(*short)
    return path if len(str(path)) <= _MAX_NAME else Path(f"{index + 1:06d}{_suffix(short[-1])}")


def _suffix(name: str) -> str:
    """The suffix that readers go by ('.nii.gz', '.dcm', ''), if it is a plain one."""
    found = re.search(r"(?<=.)((\.nii)?\.[A-Za-z0-9]{1,8})$", name, re.IGNORECASE)
    return found[1] if found else ""


def _own_name(member: Member, number: int) -> str:
    """``000001.dcm``: nothing of the member's own name but its suffix."""
    hidden = ".hidden" if member.path.name.startswith(".") else ""  # stays what it is to readers: no lost slice
    return f"{number:06d}{hidden or _suffix(member.path.name)}"


class _Budget:
    """Bytes that may be taken out of one archive."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        with _told(archive):
            self.left = max(ALLOWANCE_BYTES, MAX_RATIO * archive.stat().st_size)

    def spend(self, count: int) -> None:
        """Take ``count`` bytes off; ``InputError`` if there are not that many left."""
        self.left -= count
        if self.left < 0:
            raise InputError(
                f"{self.archive}: its contents are more than {MAX_RATIO} times its size, as in an archive made to fill "
                "disks: not opened. If it is sound, unpack it and give the folder"
            )


def _check_room(folder: Path, needed: int, archive: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed + RESERVE_BYTES > free:
        raise ResourceError(
            f"{archive}: {needed / 1e6:.0f} MB have to be taken out, but the temporary folder has {free / 1e6:.0f} MB "
            f"free ({RESERVE_BYTES / 1e6:.0f} MB of them are left alone): make room, or set TMPDIR to a larger disk"
        )


def _take_out(
    opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, budget: _Budget, *, peek: Path | None = None
) -> None:
    """One member into a new file; with its name as ``peek`` only its start if that shows it to be of no use."""
    archive = budget.archive
    with _told(archive):
        stream = opened.open(info)
    with stream:
        with _told(archive):
            block = stream.read(START_BYTES)
        start_only = peek is not None and not _promising(peek, block)
        if not start_only:
            _check_room(target.parent, info.file_size, archive)
        with target.open("xb") as out:
            while block:
                budget.spend(len(block))
                try:
                    out.write(block)
                except OSError as error:
                    raise ResourceError(
                        f"{archive}: a member could not be taken out ({error.strerror}): make room in the temporary "
                        "folder, or set TMPDIR to a larger disk"
                    ) from error
                if start_only:
                    return
                with _told(archive):
                    block = stream.read(_BLOCK_BYTES)


def _promising(name: Path, start: bytes) -> bool:
    """Whether a member may be DICOM (with or without preamble) or an archive."""
    return start[128:132] == b"DICM" or start[:1] in (b"\x02", b"\x08", b"\0") or bool(packed_kind(name, start))
