"""Reading artefacts: the schema and nothing but the schema, lazily, one handle per process.

HDF5 files are untrusted input: external links, virtual datasets, external storage, unknown names, other dtypes and
impossible sizes are refused before any data is read (RELIABILITY 4, points 4 and 8).
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lungseg.errors import LungsegError, MismatchError, StoreError
from lungseg.store.schema import FORMAT, FORMAT_VERSION, MAX_CHUNK_BYTES, MAX_DATASET_BYTES, SCHEMA

MAX_OPEN_FILES = 32


class Artefact:
    """One opened HDF5 file of a store; use as a context manager or close it."""

    def __init__(self, path: Path, kind: str) -> None:
        """Open and check ``path``.

        Raises
        ------
        StoreError
            If it is missing, truncated, not HDF5, or holds anything the schema of ``kind`` does not allow.
        MismatchError
            If it is a store file of another format version or kind.
        """
        self.path = path
        self.kind = kind
        try:
            self._file = h5py.File(path, "r", locking=False)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing") from error
        except OSError as error:
            raise StoreError(
                f"{path} is not a readable HDF5 file ({error}); delete it and run its stage again"
            ) from error
        try:
            self._check()
        except LungsegError:
            self._file.close()
            raise
        except Exception as error:  # whatever HDF5 makes of damaged headers
            self._file.close()
            raise StoreError(f"{path} is damaged ({error}); delete it and run its stage again") from error

    def _check(self) -> None:
        if self._text("format") != FORMAT:
            raise StoreError(f"{self.path} is not a file of a lungseg store")
        version, kind = self._version(), self._text("kind")
        if version != FORMAT_VERSION:
            raise MismatchError(f"{self.path} has store format {version}, this lungseg reads {FORMAT_VERSION}")
        if kind != self.kind:
            raise MismatchError(f"{self.path} is a '{kind}' file, not '{self.kind}'")
        self.fingerprint = self._text("fingerprint")
        """SHA-256 written when the file was made."""
        self.provenance: dict[str, Any] = json.loads(self._text("provenance"))
        """What the file says about its making."""
        if not self.fingerprint or not isinstance(self.provenance.get("inputs"), dict):
            raise ValueError("no fingerprint or inputs in its header")
        check_schema(self._file, self.path, self.kind)

    def _text(self, name: str) -> str:
        """A root attribute of text; "" unless of fixed length, as ``write_artefact`` makes them (it says why)."""
        attrs = self._file.attrs
        kind = h5py.check_string_dtype(attrs.get_id(name).dtype) if name in attrs else None
        return "" if kind is None or kind.length is None else bytes(attrs[name]).decode()

    def _version(self) -> int:
        """Format version; -1 if it is no number."""
        attrs = self._file.attrs
        known = "format_version" in attrs and attrs.get_id("format_version").dtype.kind in "iu"
        return int(attrs["format_version"]) if known else -1

    def require_input(self, name: str, fingerprint: str) -> None:
        """Refuse this file unless it was made from the input with this fingerprint.

        Raises
        ------
        MismatchError
            Naming both files.
        """
        if self.provenance["inputs"].get(name) != fingerprint:
            raise MismatchError(
                f"{self.path} was made from another {name} than the one beside it: run its stage again with --overwrite"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dataset without reading it."""
        return tuple(self._file[name].shape)

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of a dataset."""
        return dict(self._file[name].attrs)

    def names(self) -> list[str]:
        """Datasets in the file."""
        return [name for name in SCHEMA[self.kind] if name in self._file]

    def read(self, name: str, box: tuple[slice, ...] = ()) -> np.ndarray:
        """A dataset, or a hyperslab of it.

        Raises
        ------
        StoreError
            If a checksum fails or the data cannot be decoded.
        """
        try:
            return np.asarray(self._file[name][box or ...])
        except OSError as error:
            raise StoreError(
                f"{self.path}: {name} is damaged ({error}); delete the file and run its stage again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Artefact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_schema(file: h5py.File, path: Path, kind: str) -> None:
    """Walk a file once and refuse whatever the schema of ``kind`` does not allow.

    Raises
    ------
    StoreError
        Naming the first offending object.
    """
    specs = SCHEMA[kind]
    groups = {name.rpartition("/")[0] for name in specs if "/" in name}
    found: set[str] = set()

    def walk(group: h5py.Group, prefix: str) -> None:
        for key in group:
            name = prefix + key
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise StoreError(f"{path}: '{name}' is a link to elsewhere; refused")
            item = group[key]
            if isinstance(item, h5py.Group):
                if name not in groups:
                    raise StoreError(f"{path}: unexpected group '{name}'")
                walk(item, name + "/")
            elif name in specs and isinstance(item, h5py.Dataset):
                _check_dataset(item, path, name, kind)
                found.add(name)
            else:
                raise StoreError(f"{path}: unexpected object '{name}'")

    walk(file, "")
    missing = {name for name, spec in specs.items() if spec.required} - found
    if missing:
        raise StoreError(f"{path}: {', '.join(sorted(missing))} missing")


def _check_dataset(item: h5py.Dataset, path: Path, name: str, kind: str) -> None:
    spec = SCHEMA[kind][name]
    if item.is_virtual or item.external:
        raise StoreError(f"{path}: '{name}' keeps its data elsewhere; refused")
    if item.dtype != np.dtype(spec.dtype) or item.ndim != spec.rank:
        raise StoreError(f"{path}: '{name}' is {item.dtype} of rank {item.ndim}, expected {spec.dtype} of {spec.rank}")
    size = int(np.prod(item.shape, dtype=object)) * item.dtype.itemsize
    chunk = int(np.prod(item.chunks, dtype=object)) * item.dtype.itemsize if item.chunks else 0
    stored = item.id.get_storage_size()
    # deflate cannot shrink by more than about 1030 : 1, so a larger claim is a bomb or a hole
    if size > MAX_DATASET_BYTES or chunk > MAX_CHUNK_BYTES or size > 1100 * stored + 2**20:
        raise StoreError(f"{path}: '{name}' declares {size} bytes with {stored} stored; refused")


class ReaderPool:
    """Artefacts kept open, per process: a handle never crosses a fork (RELIABILITY 42)."""

    def __init__(self) -> None:
        self._pid = -1
        self._open: OrderedDict[tuple[Path, str], Artefact] = OrderedDict()

    def get(self, path: Path, kind: str) -> Artefact:
        """The opened artefact; the least recently used one is closed when too many are open."""
        if self._pid != os.getpid():
            self._pid, self._open = os.getpid(), OrderedDict()
        key = (path, kind)
        if key in self._open:
            self._open.move_to_end(key)
        else:
            self._open[key] = Artefact(path, kind)
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[key]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pid, self._open = -1, OrderedDict()
