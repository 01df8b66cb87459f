"""The voxels of an image file: decoded as a stream, checked value by value, put where they belong.

No more than the int16 array and a few megabytes are held, whatever the file declares.
"""

from __future__ import annotations

import bz2
import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.hu import HuTally, allocate, clip_notes, clip_status, require_memory, to_hu
from lungseg.scan.image_header import ImageHeader, choose_volume
from lungseg.scan.orientation import canonical_grid, stored_view
from lungseg.scan.volume import AIR_HU, Volume

MAX_LABEL = int(np.iinfo(np.uint16).max)
LABEL_ROUNDING, MAX_LABEL_STEP = 1e-3, 0.05
"""Labels this near to a whole number are taken for it. Writers that scale a float array to whole numbers (nibabel, for
one) leave half a step more, where a step, the slope of the header, is at most the second: 1 may read as 1.004."""
CHUNK_BYTES = 4 << 20
"""About how much is decoded at once."""
MAX_TRAILING_BYTES = 1 << 20
"""Zeros and line ends accepted after the voxels (padding of some writers), if they are fewer than one slice along any
axis: more mean that the header declares too few voxels; others, that bytes were put in somewhere before."""
MAX_RATIO = 1040
"""Deflate (gzip, zlib) never shrinks more than 1032 times: a file that declares more is truncated or damaged."""
MAX_LISTED = 5


class ByteStream(Protocol):
    """Anything decoded bytes can be read from."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""


class _ZlibStream:
    """Decoded bytes of a zlib or gzip stream (MetaImage uses either), a piece at a time."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._decoder, self._pending = raw, zlib.decompressobj(zlib.MAX_WBITS | 32), b""

    def read(self, size: int, /) -> bytes:
        parts, wanted = [], size
        while wanted and not self._decoder.eof:
            pending = self._pending or self._raw.read(1 << 16)
            if not pending:
                raise EOFError("compressed data ended early")
            part = self._decoder.decompress(pending, wanted)
            self._pending = self._decoder.unconsumed_tail
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)


@contextmanager
def open_decoded(path: Path, encoding: str, offset: int = 0) -> Iterator[ByteStream]:
    """The decoded bytes of a file from ``offset`` on; damage and errors of reading become an ``InputError``."""
    try:
        with path.open("rb") as raw:
            raw.seek(offset)
            if encoding == "gzip":
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream
            elif encoding == "bzip2":
                with bz2.BZ2File(raw) as stream:
                    yield stream
            else:
                yield _ZlibStream(raw) if encoding == "zlib" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); copy or convert it again") from error
    except OSError as error:
        # bz2 reports damage as an OSError without a number
        what = "cannot be read" if error.errno else "truncated or damaged"
        raise InputError(f"{path}: {what} ({error.strerror or error})") from error


def read_volume(header: ImageHeader, options: ReadOptions, *, integer: bool, name: str) -> tuple[Volume, HuTally]:
    """The volume a header describes, in the canonical orientation.

    Parameters
    ----------
    header : ImageHeader
        Of the file.
    options : ReadOptions
        ``volume`` and ``nan_to_air`` are used; the latter for CT only.
    integer : bool
        False: CT, int16 HU. True: labels, uint8 or uint16.
    name : str
        What is being read, for messages.

    Returns
    -------
    (Volume, HuTally)
        With notes and status; the tally is empty for labels.

    Raises
    ------
    InputError
        If the file is truncated or damaged, holds more than its header declares, NaN or infinity, or (labels) anything
        but whole numbers from 0 to 65535.
    ResourceError
        If the machine could not hold the volume.
    """
    index = choose_volume(header, options.volume, name)
    require_memory(header.geometry.shape, np.int16, name=name)
    _check_file_size(header, name)
    grid, axes, flips = canonical_grid(header.geometry)
    array = allocate(grid.shape, np.uint16 if integer else np.int16, name=name)
    step = abs(header.slope)
    near = max(LABEL_ROUNDING, 0.51 * step) if step <= MAX_LABEL_STEP else LABEL_ROUNDING
    collector = _Collector(stored_view(array, axes, flips), integer, near)
    with open_decoded(header.data_path, header.encoding, header.file_offset) as stream:
        for k, rows, block in _blocks(stream, header, index, name):
            collector.add(k, rows, block)
    notes, status = collector.finish(options, name)
    if integer and array.max() <= np.iinfo(np.uint8).max:
        array = array.astype(np.uint8)
    return Volume(array, grid, axes, flips, notes=header.notes + notes, status=status), collector.tally


def _check_file_size(header: ImageHeader, name: str) -> None:
    """Refuse a file that cannot hold what its header declares, before anything is decoded."""
    declared = math.prod(header.geometry.shape) * header.volumes * header.dtype.itemsize + header.skip
    try:
        there = header.data_path.stat().st_size - header.file_offset
    except OSError as error:
        raise InputError(f"{name}: the file of its voxels cannot be read ({error.strerror})") from error
    limit = {"raw": there, "gzip": MAX_RATIO * there, "zlib": MAX_RATIO * there}.get(header.encoding, declared)
    if declared > max(limit, 0):
        raise InputError(
            f"{name}: truncated or damaged: its header declares {declared} bytes, and {max(there, 0)} are there "
            f"({header.encoding}); copy or convert it again"
        )


def _blocks(
    stream: ByteStream, header: ImageHeader, volume: int, name: str
) -> Iterator[tuple[int, slice, np.ndarray[Any, Any]]]:
    """(slice, rows, values) of one volume in the file's own order, scaled; reads to the end to verify checksums."""
    count, height, width = header.geometry.shape
    item = header.dtype.itemsize
    _skip(stream, header.skip, "within its header", name)
    _skip(stream, volume * count * height * width * item, f"before volume {volume}", name)
    step = max(1, CHUNK_BYTES // (width * item))
    is_scaled = header.slope != 1.0 or header.intercept != 0.0
    for k in range(count):
        for first in range(0, height, step):
            rows = slice(first, min(first + step, height))
            size = (rows.stop - first) * width * item
            raw = stream.read(size)
            if len(raw) != size:
                raise InputError(f"{name}: truncated or damaged in slice {k + 1} of {count}; copy or convert it again")
            block = np.frombuffer(raw, header.dtype).reshape(-1, width)
            if is_scaled:
                with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, and refused as that
                    block = block * np.float64(header.slope) + header.intercept
            yield k, rows, block
    _skip(stream, (header.volumes - 1 - volume) * count * height * width * item, f"after volume {volume}", name)
    face = min(count * height, count * width, height * width) * item
    most = min(MAX_TRAILING_BYTES, face - 1)
    surplus = stream.read(most + 1)
    if len(surplus) > most or surplus.strip(b"\0\r\n"):
        raise InputError(f"{name}: holds more bytes of voxels than its header declares; convert it again")


def _skip(stream: ByteStream, size: int, where: str, name: str) -> None:
    """Read over ``size`` bytes, a piece at a time."""
    while size > 0:
        got = len(stream.read(min(size, CHUNK_BYTES)))
        if not got:
            raise InputError(f"{name}: truncated or damaged {where}; copy or convert it again")
        size -= got


@dataclass
class _Collector:
    """Receives blocks in the file's order; every value is checked before anything is judged."""

    view: np.ndarray
    """The canonical array, seen in the file's order."""
    integer: bool
    near: float
    """How far from a whole number a label may lie."""
    tally: HuTally = field(default_factory=HuTally)
    nonfinite: int = 0
    low: int = 0
    high: int = 0
    wrong: set[float] = field(default_factory=set)

    def add(self, k: int, rows: slice, block: np.ndarray) -> None:
        if block.dtype.kind == "f":
            bad = ~np.isfinite(block)
            count = int(np.count_nonzero(bad))
            if count:
                self.nonfinite += count
                block = np.where(bad, block.dtype.type(0 if self.integer else AIR_HU), block)
        if not self.integer:
            out = np.empty(block.shape, np.int16)
            below, above = to_hu(block, out, self.tally)
            self.low, self.high = self.low + below, self.high + above
            self.view[k, rows] = out
            return
        stored = block
        if block.dtype.kind == "f":
            block = np.rint(stored)
        odd = (block < 0) | (block > MAX_LABEL)
        if block is not stored:
            odd |= np.abs(stored - block) > self.near
        if odd.any():
            if len(self.wrong) < MAX_LISTED:
                self.wrong.update(np.unique(stored[odd])[:MAX_LISTED].tolist())
            block = np.where(odd, 0, block)
        self.view[k, rows] = block.astype(np.uint16)

    def finish(self, options: ReadOptions, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Notes and status of the whole volume, or the error that the values call for."""
        if self.nonfinite and (self.integer or not options.nan_to_air):
            fix = "" if self.integer else ", or give --nan-to-air"
            raise InputError(
                f"{name}: {self.nonfinite} voxels are NaN or infinite; replace them "
                f"({'by 0' if self.integer else f'by air, {AIR_HU}'}, outside the scan){fix}"
            )
        if self.wrong:
            values = ", ".join(f"{v:g}" for v in sorted(self.wrong)[:MAX_LISTED])
            raise InputError(f"{name}: a label map holds whole numbers from 0 to {MAX_LABEL}, but this has {values}")
        if self.integer:
            return (), ()
        notes, status = clip_status(self.tally)
        notes = clip_notes(self.low, self.high, self.view.size) + notes
        if self.nonfinite:
            notes += (f"{self.nonfinite} voxels were NaN or infinite and were set to {AIR_HU} HU, as asked",)
            status = ("nan-replaced", *status)
        return notes, status
