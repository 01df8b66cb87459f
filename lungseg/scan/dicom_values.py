"""Values of DICOM elements as plain text and numbers, straight from their bytes: nothing is trusted, nothing raises."""

from __future__ import annotations

from typing import Any

import numpy as np

Cosines = tuple[float, float, float, float, float, float]
MAX_TEXT = 64
"""Longest LO/SH value of the standard; longer ones are cut."""
COSINE_TOLERANCE = 0.01
"""Rounded direction cosines have lengths well within 1 % of 1."""


def text(dataset: Any, tag: int) -> str:
    """Text of an element of a pydicom dataset; empty if it is absent or no text. Not UTF-8 is taken as Latin-1."""
    element = dataset.get_item(tag, keep_deferred=True)
    value = getattr(element, "value", None)
    if not isinstance(value, bytes):
        return ""
    try:
        return value.decode("utf-8").strip(" \0")
    except UnicodeDecodeError:
        return value.decode("latin-1").strip(" \0")


def unsigned(dataset: Any, tag: int) -> int | None:
    """The one 16-bit number of an element, as unsigned whatever its VR says; None if it is not exactly that."""
    element = dataset.get_item(tag, keep_deferred=True)
    value = getattr(element, "value", None)
    if not isinstance(value, bytes) or len(value) != 2:
        return None
    return int.from_bytes(value, "little" if element.is_little_endian else "big")


def floats(value: str, count: int) -> tuple[float, ...] | None:
    """Numbers of a decimal string value, or None if they are not exactly ``count`` finite ones."""
    try:
        values = tuple(float(part) for part in value.split("\\"))
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def first_float(value: str) -> float | None:
    """The one finite number of a decimal string value, or None."""
    values = floats(value, 1)
    return values[0] if values else None


def unit_cosines(values: tuple[float, ...] | None) -> Cosines | None:
    """Row and column directions scaled to length 1; None if they are absent or their lengths are not near 1."""
    if values is None:
        return None
    row, column = np.asarray(values[:3]), np.asarray(values[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > COSINE_TOLERANCE or abs(lengths[1] - 1) > COSINE_TOLERANCE:
        return None
    return tuple(float(v) for v in (*(row / lengths[0]), *(column / lengths[1])))  # type: ignore[return-value]


def plain(value: str) -> str | None:
    """Printable ASCII of a free-text value, at most 64 characters; None if nothing is left."""
    return "".join(c for c in value if " " <= c <= "~")[:MAX_TEXT].strip() or None
