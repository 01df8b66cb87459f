"""What the ids of a label map mean: built-in conventions and files, and ids turned into our classes.

Nothing is guessed: an id that a label map does not know is an error, one that means nothing is mapped to nothing.
"""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.errors import InputError, UsageError
from lungseg.tissue import CLASS_NAMES, LABEL_CONVENTIONS, MAIN_NAMES, OUTSIDE, LabelConvention, class_name

OWN_FILE = "own file"
"""What a label map from a file is called: the file's name may hold a patient's."""
MAX_ID = int(np.iinfo(np.uint16).max)
MAX_BYTES = 1 << 20
"""Larger files are no label map."""
MAX_LISTED = 10
_ITKSNAP = re.compile(r'\s*(\d+)(?:\s+[\d.]+){6}\s+"(.*)"\s*')
"""IDX R G B A VIS MSH "LABEL"."""
_SLICER = re.compile(r"\s*(\d+)\s+(\S+)(?:\s+\d+){4}\s*")
"""id name R G B A; names have underscores for blanks."""


@dataclass(frozen=True)
class LabelMap:
    """Ids of a file and the class each of them is."""

    name: str
    """Built-in name, or `own file`."""
    convention: LabelConvention

    @property
    def targets(self) -> frozenset[int]:
        """Classes that this label map can express."""
        named = (self.convention.file_names or {}).values()
        return frozenset(int(c) for c in (*self.convention.classes.values(), *named) if c != OUTSIDE)

    def class_of(self, label: int) -> int | None:
        """Class of a stored id; None if the label map does not know it."""
        if label == OUTSIDE:
            return OUTSIDE
        part = {"id": label, "type": label >> 8, "region": label & 0xFF}[self.convention.part]
        found = self.convention.classes.get(part)
        return None if found is None else int(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the record of an evaluation: no path in it."""
        classes = {str(key): class_name(value) for key, value in sorted(self.convention.classes.items())}
        return {"name": self.name, "part": self.convention.part, "classes": classes, "source": self.convention.source}


def label_map(text: str) -> LabelMap:
    """The label map that an option names: a built-in convention, or a file.

    Raises
    ------
    UsageError
        If it is neither.
    InputError
        If the file is not understood.
    """
    if text in LABEL_CONVENTIONS:
        return LabelMap(text, LABEL_CONVENTIONS[text])
    if not Path(text).is_file():
        raise UsageError(f"label map '{text}' is neither a file nor one of {', '.join(LABEL_CONVENTIONS)}")
    return read_label_map(Path(text))


def read_label_map(path: Path) -> LabelMap:
    """A label map from a file.

    Parameters
    ----------
    path : Path
        JSON or TOML (id to name, name to id or list of ids; also below `labels`, as in nnU-Net's dataset.json), CSV or
        TSV with columns `id` and `name`, a 3D Slicer colour table or an ITK-SNAP label description. Names are those
        of ``tissue.CLASS_NAMES``; `none` maps an id to nothing.

    Raises
    ------
    InputError
        If the file is none of these, a name is unknown, or an id is given twice or is not 1 to 65535.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: too large for a label map")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a label map: {error}") from error
    classes: dict[int, int] = {}
    problems: list[str] = []
    for label, name in _pairs(path, text):
        key = " ".join(re.split(r"[\s_-]+", str(name).strip().lower())) if name is not None else "none"
        found = CLASS_NAMES.get(key)
        if found is None:
            problems.append(f"id {label}: '{name}' is none of our classes")
        elif not 0 <= label <= MAX_ID or (label == OUTSIDE and found != OUTSIDE):
            problems.append(f"id {label} cannot be '{name}': ids are 1 to {MAX_ID}, and 0 is outside")
        elif classes.get(label, found) != found:
            problems.append(f"id {label} is given two classes")
        else:
            classes[label] = found
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InputError(f"{path}: {'; '.join(problems[:MAX_LISTED])}{more}. Names: {', '.join(MAIN_NAMES)}")
    if not any(classes.values()):
        raise InputError(f"{path}: no id is mapped to a class. Names: {', '.join(MAIN_NAMES)}")
    return LabelMap(OWN_FILE, LabelConvention(classes, OWN_FILE))


def _pairs(path: Path, text: str) -> Iterator[tuple[int, str | None]]:
    """Ids and names as they stand in the file."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".json", ".toml"):
            yield from _mapping_pairs(json.loads(text) if suffix == ".json" else tomllib.loads(text))
        elif suffix in (".csv", ".tsv"):
            yield from _table_pairs(text, "\t" if suffix == ".tsv" else ",")
        else:
            yield from _description_pairs(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        shown = "" if isinstance(error, (KeyError, AttributeError, TypeError)) else f" ({error})"
        raise InputError(
            f"{path}: not understood as a label map{shown}. Give JSON or TOML like {{'3': 'ggo'}} or "
            "{'ggo': 3, 'fibrosis': [4, 5]}, or CSV with columns id,name"
        ) from error


def _mapping_pairs(document: Any) -> Iterator[tuple[int, str | None]]:
    table: Mapping[str, Any] = document.get("labels", document)
    for key, value in table.items():
        if key.strip().isdigit():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"'{key}' needs a name")
            yield int(key), value
        else:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, bool) or not isinstance(item, (int, str)):
                    raise ValueError(f"'{key}' needs an id or a list of ids")
                yield int(item), key


def _table_pairs(text: str, delimiter: str) -> Iterator[tuple[int, str | None]]:
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    columns = {str(name).strip().lower(): name for name in reader.fieldnames or ()}
    id_column = next((columns[name] for name in ("id", "label", "value", "labelvalue") if name in columns), None)
    name_column = next((columns[name] for name in ("name", "class") if name in columns), None)
    if id_column is None or name_column is None:
        raise ValueError("columns id and name are needed")
    for row in reader:
        yield int(row[id_column]), row[name_column] or None


def _description_pairs(text: str) -> Iterator[tuple[int, str | None]]:
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ITKSNAP.fullmatch(line) or _SLICER.fullmatch(line)
        if match is None:
            raise ValueError(f"line '{line.strip()[:60]}'")
        yield int(match[1]), match[2]


def to_classes(labels: np.ndarray, mapping: LabelMap, *, name: str, option: str) -> np.ndarray:
    """Class ids of a label map, uint8.

    Parameters
    ----------
    labels : uint8 or uint16 array, shape (Z, Y, X)
        Stored ids.
    mapping : LabelMap
    name, option : str
        What is being read and the option that changes its label map, for the message.

    Returns
    -------
    uint8 array of that shape
        ``Tissue`` and ``LungLabel`` ids, ``OUTSIDE``, ``UNCLASSIFIED``.

    Raises
    ------
    InputError
        If an id occurs that the label map does not know; all of them are listed with their voxels.

    Source
    ------
    RELIABILITY rows 34, 71.
    """
    size = 256 if labels.dtype == np.uint8 else MAX_ID + 1
    counts = np.zeros(size, dtype=np.int64)
    for plane in labels:  # slice by slice: bincount makes an int64 copy
        counts += np.bincount(plane.ravel(), minlength=size)
    table = np.zeros(size, dtype=np.uint8)
    foreign = []
    for label in np.flatnonzero(counts).tolist():
        found = mapping.class_of(label)
        if found is None:
            foreign.append(f"{label} ({counts[label]} voxels)")
        else:
            table[label] = found
    if foreign:
        more = f" and {len(foreign) - MAX_LISTED} more" if len(foreign) > MAX_LISTED else ""
        raise InputError(
            f"{name} holds label ids that label map '{mapping.name}' does not know: "
            f"{', '.join(foreign[:MAX_LISTED])}{more}. Say what they mean with {option} FILE "
            "(each id and its name; `none` for ids that are no tissue)"
        )
    out = np.empty(labels.shape, dtype=np.uint8)
    for source, target in zip(labels, out, strict=True):
        np.take(table, source, out=target)
    return out
