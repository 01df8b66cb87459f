"""What a mutant is, and what a fair judge may expect of a reader who is given it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungseg.scan.volume import Geometry


@dataclass(frozen=True)
class Expectation:
    """What a fair judge asks of the reader."""

    geometry: Geometry
    slice_axis: int
    touched: frozenset[int] = frozenset()
    """Slices whose files were changed: only there may the volume differ, and only from an end may they be missing."""
    may_vanish: bool = False
    """Whether a touched slice at an end of the stack may be left out: nothing tells that it was ever there."""
    free: frozenset[int] = frozenset()
    """Slices whose voxels may be anything that their neighbours do not give away: no transfer syntax has
    a checksum."""
    must_refuse: bool = False
    """Whether any volume at all is a wrong one."""
    header: bool = False
    """Image files: whether the header was changed, in which much is said only once."""
    forms: str = ""
    """NIfTI: where the orientation is given: 'qs' twice, 'q' or 's' once."""


@dataclass(frozen=True)
class Mutant:
    """Files to write, and what to expect."""

    kind: str
    base: str
    detail: str
    files: dict[str, bytes]
    expect: Expectation


def flip_bytes(data: bytes, rng: np.random.Generator, start: int, stop: int, count: int) -> bytes:
    raw = bytearray(data)
    for at in rng.integers(start, max(stop, start + 1), size=count):
        at = min(int(at), len(raw) - 1)
        raw[at] = int(rng.integers(256)) if rng.random() < 0.5 else raw[at] ^ (1 << int(rng.integers(8)))
    return bytes(raw)
