"""What may stand in the files of a patch store, and how they are written: the table of the format.

Every HDF5 file is one *artefact* of one stage for one case. Its root attributes are ``format``,
``format_version``, ``kind``, ``provenance`` (canonical JSON: lungseg version, the full configuration of the stage,
seed, the fingerprint of each input, anything else the stage wants to say) and ``fingerprint`` (SHA-256 of all of it).
There are no time stamps: the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lungseg import __version__
from lungseg.errors import MismatchError
from lungseg.store.atomic import atomic_path, canonical_json

FORMAT = "lungseg-store"
FORMAT_VERSION = 1
MAX_DATASET_BYTES = 64 * 2**30
"""Declared sizes above this are refused before anything is allocated (a whole-body CT at 0.3 mm has 12 GiB)."""
MAX_CHUNK_BYTES = 64 * 2**20
GZIP_LEVEL = 4
"""gzip 4 + shuffle: within 2 % of gzip 9 in size, at seven times its writing speed (tests/benchmarks/RESULTS.md)."""
CHUNK = (16, 32, 32)
"""Chunk of volumes: best ratio of those tried, nearly the fastest random patches (tests/benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset a file may hold."""

    dtype: str
    rank: int
    required: bool = True


SCHEMA: Mapping[str, Mapping[str, DatasetSpec]] = {
    "volume": {
        "image": DatasetSpec("int16", 3),
        "mask": DatasetSpec("uint8", 3),
        "patches/corner": DatasetSpec("int32", 2),
        "patches/mask_fraction": DatasetSpec("float32", 1),
        "source/image": DatasetSpec("int16", 3, required=False),
        "source/mask": DatasetSpec("uint8", 3, required=False),
    },
    "reference": {"labels": DatasetSpec("uint8", 3)},
    "radiomics": {"corner": DatasetSpec("int32", 2), "features": DatasetSpec("float32", 2)},
    "tokens": {
        "index": DatasetSpec("int32", 2),
        "features": DatasetSpec("float32", 2),
        "statistics": DatasetSpec("float32", 2),
        "shares": DatasetSpec("float32", 2, required=False),
    },
    "clusters": {"posterior": DatasetSpec("float16", 4), "coverage": DatasetSpec("uint8", 3)},
    "labels": {"labels": DatasetSpec("uint8", 3), "confidence": DatasetSpec("uint8", 3)},
}
"""kind of file -> its datasets. Nothing else is accepted by the reader."""


def make_provenance(
    stage: str, config: Mapping[str, Any], *, inputs: Mapping[str, str] | None = None, **extra: Any
) -> dict[str, Any]:
    """What an artefact says about its making: stage, full configuration, fingerprint of each input.

    ``extra`` values must be JSON types.
    """
    return {
        "lungseg_version": __version__,
        "stage": stage,
        "config": dict(config),
        "inputs": dict(inputs or {}),
        **extra,
    }


def fingerprint(kind: str, provenance: Mapping[str, Any], datasets: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over kind, format version, provenance and the content of every dataset (hex, 64 characters)."""
    digest = hashlib.sha256(f"{FORMAT}/{FORMAT_VERSION}/{kind}\n{canonical_json(provenance)}\n".encode())
    for name in sorted(datasets):
        array = np.ascontiguousarray(datasets[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def write_artefact(
    path: Path,
    kind: str,
    datasets: Mapping[str, np.ndarray],
    *,
    provenance: Mapping[str, Any],
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Write one artefact atomically; returns its fingerprint.

    Parameters
    ----------
    path : Path
        Final name; nothing is there until the file is complete.
    kind, datasets, provenance, attributes
        See :func:`artefact_bytes`.
    """
    image, mark = artefact_bytes(kind, datasets, provenance=provenance, attributes=attributes)
    with atomic_path(path) as partial:
        partial.write_bytes(image)
    return mark


def artefact_bytes(
    kind: str,
    datasets: Mapping[str, np.ndarray],
    *,
    provenance: Mapping[str, Any],
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[bytes, str]:
    """The HDF5 file of one artefact in memory (compressed), and its fingerprint.

    Made in memory and written by Python: HDF5 crashes the process when the disk is full under it.

    Parameters
    ----------
    kind : str
        Key of ``SCHEMA``; dtypes and ranks are checked against it.
    datasets : mapping of str to array
        Arrays by name. Two names may share one array object: the second becomes a hard link.
    provenance : mapping
        JSON types, see :func:`make_provenance`.
    attributes : mapping of dataset name to attributes
        Extra attributes for people who read the file with plain h5py (unit, spacing_mm, ...). They repeat what the
        provenance says and are not part of the fingerprint.
    """
    specs = SCHEMA[kind]
    missing = {name for name, spec in specs.items() if spec.required} - set(datasets)
    wrong = {name for name in datasets if name not in specs}
    if missing or wrong:
        raise ValueError(f"{kind}: missing {sorted(missing)}, unknown {sorted(wrong)}")
    for name, array in datasets.items():
        if array.dtype != np.dtype(specs[name].dtype) or array.ndim != specs[name].rank:
            raise ValueError(f"{kind}/{name}: {array.dtype} rank {array.ndim}, schema says {specs[name]}")
    mark = fingerprint(kind, provenance, datasets)
    header = {"kind": kind, "provenance": canonical_json(provenance), "fingerprint": mark}
    return _file_image(header, datasets, attributes or {}), mark


def _file_image(
    header: Mapping[str, str], datasets: Mapping[str, np.ndarray], attributes: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """The bytes of an HDF5 file."""
    with h5py.File("image", "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.attrs["format_version"] = FORMAT_VERSION
        for key, text in {"format": FORMAT, **header}.items():
            # of fixed length: HDF5 keeps others in a heap without checksum, and can loop for ever in a damaged one
            data = text.encode()
            file.attrs.create(key, data, dtype=h5py.string_dtype("utf-8", len(data)))
        for group in sorted({name.rpartition("/")[0] for name in datasets} - {""}):
            _make_group(file, group)
        written: dict[int, str] = {}
        for name in sorted(datasets):
            array = datasets[name]
            if id(array) in written:
                file[name] = file[written[id(array)]]
                continue
            written[id(array)] = name
            _write_dataset(file, name, array)
        for name, values in attributes.items():
            for key in sorted(values):
                file[name].attrs[key] = values[key]
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _make_group(file: h5py.File, name: str) -> None:
    """Without the time it was made at, which HDF5 keeps of a group that comes to be with a link below it."""
    properties = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    properties.set_obj_track_times(False)
    h5py.h5g.create(file.id, name.encode(), gcpl=properties)


def _write_dataset(file: h5py.File, name: str, array: np.ndarray) -> None:
    if array.size == 0:
        file.create_dataset(name, data=array)
        return
    chunks: tuple[int, ...]
    if array.ndim >= 3:  # one class of a posterior at a time
        ones = (1,) * (array.ndim - 3)
        chunks = ones + tuple(min(c, n) for c, n in zip(CHUNK, array.shape[-3:], strict=True))
    else:  # whole rows, about 1 MiB of them
        row = int(np.prod(array.shape[1:])) * array.dtype.itemsize
        chunks = (max(1, min(array.shape[0], 2**20 // row)), *array.shape[1:])
    file.create_dataset(
        name, data=array, chunks=chunks, compression="gzip", compression_opts=GZIP_LEVEL, shuffle=True, fletcher32=True
    )


def check_current(
    existing: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str, overwrite_hint: str = "--overwrite"
) -> None:
    """Refuse an existing result whose configuration or inputs differ from what is asked for now.

    Raises
    ------
    MismatchError
        Naming each differing setting or input with both values.
    """
    differences = []
    for section in ("config", "inputs"):
        old, new = existing.get(section, {}), wanted.get(section, {})
        for key in sorted(set(old) | set(new)):
            # compare as read from JSON: tuples and lists, 1 and 1.0 are the same setting
            if json.loads(json.dumps(old.get(key))) != json.loads(json.dumps(new.get(key))):
                differences.append(
                    f"{section[:-1] if section == 'inputs' else section} {key}: "
                    f"there {_short(old.get(key))}, now {_short(new.get(key))}"
                )
    if differences:
        raise MismatchError(
            f"{what} was made with other settings or inputs ({'; '.join(differences)}). "
            f"Use {overwrite_hint} to replace it, or give the result another name"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
