"""The store as a folder: its cases, where their files are, and names that are safe to write."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lungseg import __version__
from lungseg.errors import InputError, MismatchError, StoreError
from lungseg.store.atomic import PARTIAL, read_json, write_json
from lungseg.store.locks import lock
from lungseg.store.reader import Artefact
from lungseg.store.schema import FORMAT, FORMAT_VERSION, check_current

MAX_NAME = 64
SHORT_WAIT_S = 30.0
"""Seconds to wait for another process at the same store.json or id map, which takes milliseconds."""
GRID_SETTINGS = ("spacing_mm", "patch_size", "patch_stride")
"""Settings of preprocess that all cases used together must share: network and features count in voxels."""
MAX_LISTED = 10
"""Cases named in a message before it says how many more there are."""
ID_MAP_COLUMNS = ("case_id", "patient_id", "source")
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}


def check_name(name: str) -> str:
    """``name`` if it may become a file name: letters, digits, . _ -, at most 64, no dot at either end, none reserved.

    Raises
    ------
    InputError
        Otherwise, saying what is allowed.
    """
    reserved = name.split(".")[0].lower() in _RESERVED or name.endswith((".", PARTIAL))
    if len(name) > MAX_NAME or not _SAFE.fullmatch(name) or reserved:
        raise InputError(f"{name!r:.80} cannot be a name: use letters, digits, '.', '_' and '-', at most {MAX_NAME}")
    return name


def hashed_id(salt: str, value: str | bytes) -> str:
    """Twelve hexadecimal digits of HMAC-SHA-256: the de-identified form of a UID or a voxel digest."""
    data = value.encode() if isinstance(value, str) else value
    return hmac.new(salt.encode(), data, hashlib.sha256).hexdigest()[:12]


def check_store_place(path: Path) -> None:
    """Refuse a place where no store can be made or opened; writes nothing.

    Raises
    ------
    InputError
        If ``path`` or a folder above it is a file, or ``path`` is a folder with other things in it.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give the output folder another name")
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"{path} cannot be made: {parent} is a file; give another output folder")
    if path.is_dir() and not (path / "store.json").exists():
        strangers = [child.name for child in path.iterdir() if not child.name.startswith("store.json")]
        if strangers:
            raise InputError(f"{path} exists and is not a patch store; give an empty or new folder")


class Store:
    """A patch store: one folder, one file per case and stage."""

    def __init__(self, path: Path) -> None:
        """Open an existing store.

        Raises
        ------
        StoreError
            If there is none at ``path``.
        MismatchError
            If it has another format version.
        """
        self.path = path
        if not (path / "store.json").is_file():
            raise StoreError(
                f"{path} is not a patch store (no store.json); make one with: lungseg preprocess SCANS -o {path}"
            )
        self.header: dict[str, Any] = read_json(path / "store.json")
        if not isinstance(self.header, dict):
            raise StoreError(f"{path / 'store.json'} is damaged: not a JSON object")
        if self.header.get("format") != FORMAT or self.header.get("format_version") != FORMAT_VERSION:
            raise MismatchError(
                f"{path} is a store of format {self.header.get('format_version')}; this lungseg reads {FORMAT_VERSION}"
            )
        missing = [key for key in ("lungseg_version", "config", "salt", "provenance") if key not in self.header]
        if missing:
            raise StoreError(f"{path / 'store.json'} is damaged: {', '.join(missing)} missing")

    @classmethod
    def create(
        cls, path: Path, *, config: Mapping[str, Any], salt: str, provenance: str, overwrite: bool = False
    ) -> Store:
        """Open the store at ``path``, or make it.

        An existing store keeps its salt; its configuration must be the same unless ``overwrite``.

        Raises
        ------
        InputError
            If ``path`` is no place for a store, see :func:`check_store_place`.
        MismatchError
            If the store was made with another configuration.
        """
        check_store_place(path)
        with lock(path / "store.json.lock", wait_s=SHORT_WAIT_S):  # shards of one array job start together
            if (path / "store.json").exists():
                store = cls(path)
                settings = {key: value for key, value in config.items() if key != "salt"}
                known = {key: value for key, value in store.header["config"].items() if key != "salt"}
                given = config.get("salt")
                if given and given != store.salt:
                    raise MismatchError(f"{path} was made with another --salt; use that one or another folder")
                if not overwrite:
                    check_current({"config": known}, {"config": settings}, what=f"store {path}")
                if overwrite and known != settings:
                    write_json(path / "store.json", {**store.header, "config": dict(config)})
                return cls(path)
            header = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "lungseg_version": __version__,
                "config": dict(config),
                "salt": salt or secrets.token_hex(16),
                "provenance": provenance,
            }
            write_json(path / "store.json", header)
        return cls(path)

    @property
    def salt(self) -> str:
        """Secret of the hashed ids."""
        return str(self.header["salt"])

    def case_ids(self) -> list[str]:
        """Ids of the cases whose volume is complete, sorted."""
        folder = self.path / "cases"
        if not folder.is_dir():
            return []
        return sorted(child.name for child in folder.iterdir() if (child / "volume.h5").is_file())

    def require_cases(self) -> list[str]:
        """``case_ids``, or an error if there are none."""
        ids = self.case_ids()
        if not ids:
            raise InputError(f"store {self.path} holds no complete case; run: lungseg preprocess SCANS -o {self.path}")
        return ids

    def check_uniform(self, case_ids: Iterable[str] | None = None) -> None:
        """Refuse cases of another grid or patch table than the store's present settings.

        ``create`` with ``overwrite`` changes the settings of the store, while cases not given then keep theirs.
        Only headers are read. Settings that the store or a case does not state (synthetic stores) are not compared.

        Parameters
        ----------
        case_ids : iterable of str, optional
            Cases to be used together; all by default. None at all is no error.

        Raises
        ------
        MismatchError
            Listing the cases whose ``GRID_SETTINGS`` differ, with the values of both sides.
        """
        present = {key: self.header["config"][key] for key in GRID_SETTINGS if key in self.header["config"]}
        wrong = []
        for case_id in self.case_ids() if case_ids is None else case_ids:
            try:
                with self.open(case_id, "volume") as volume:
                    config = volume.provenance.get("config", {})
            except StoreError:
                continue  # a damaged case is reported when its turn comes; the others go on
            # both were read from JSON: lists and numbers compare as they are
            differing = [f"{key} {config[key]}" for key in present if key in config and config[key] != present[key]]
            if differing:
                wrong.append(f"{case_id} ({', '.join(differing)})")
        if wrong:
            more = f" and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
            settings = ", ".join(f"{key} {value}" for key, value in present.items())
            raise MismatchError(
                f"{self.path}: {len(wrong)} cases were made with other settings than the store's ({settings}): "
                f"{', '.join(wrong[:MAX_LISTED])}{more}. Run lungseg preprocess --overwrite for these scans too, or "
                "keep them in a store of their own"
            )

    def case_file(self, case_id: str, kind: str, name: str = "") -> Path:
        """Path of a case's artefact: ``cases/<id>/<kind>[.<name>].h5``."""
        file = f"{kind}.{check_name(name)}.h5" if name else f"{kind}.h5"
        return self._inside(self.path / "cases" / check_name(case_id)) / file

    def lock_file(self, case_id: str, stage: str) -> Path:
        """Path of the lock of one case and stage."""
        return self._inside(self.path / "cases" / check_name(case_id)) / f".{stage}.lock"

    def open(self, case_id: str, kind: str, name: str = "") -> Artefact:
        """An opened and checked artefact of a case."""
        return Artefact(self.case_file(case_id, kind, name), kind)

    def fit_dir(self, name: str) -> Path:
        """Folder of a fitted clustering."""
        return self._inside(self.path / "fits" / check_name(name))

    def _inside(self, folder: Path) -> Path:
        """``folder`` if it lies in the store when links are followed; ``StoreError`` otherwise. RELIABILITY 4.3."""
        root = os.path.realpath(self.path)
        if os.path.commonpath([root, os.path.realpath(folder)]) != root:
            raise StoreError(f"{folder} is a link that leads out of the store: put the folder itself there")
        return folder

    def is_done(self, path: Path, kind: str, wanted: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Whether ``path`` holds the wanted result; with ``overwrite`` a different or damaged one counts as not done.

        Raises
        ------
        MismatchError
            If it was made with other settings or inputs and ``overwrite`` is off.
        StoreError
            If it is damaged and ``overwrite`` is off.
        """
        if not path.exists():
            return False
        try:
            with Artefact(path, kind) as artefact:
                check_current(artefact.provenance, wanted, what=str(path))
            return True
        except (MismatchError, StoreError):
            if not overwrite:
                raise
        return False

    def leftovers(self) -> list[Path]:
        """Partial files left by killed runs."""
        return sorted(path for path in self.path.rglob(f"*{PARTIAL}") if not path.is_symlink())


def check_id_map_place(path: Path, store: Path) -> None:
    """Refuse an id map inside the store, which it would identify; nothing has to exist yet.

    Raises
    ------
    InputError
        If ``path`` lies inside ``store``, links followed.
    """
    if path.resolve().is_relative_to(store.resolve()):
        raise InputError(f"--id-map {path} lies inside the store; put it elsewhere, it identifies patients")


def write_id_map(path: Path, store: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write which source became which case: CSV of case_id, patient_id, source; mode 0600; outside the store.

    Rows of earlier runs for other cases are kept.

    Raises
    ------
    InputError
        If ``path`` lies inside the store.
    """
    import csv
    import io

    from lungseg.store.atomic import write_text

    check_id_map_place(path, store)
    with lock(path.with_name(path.name + ".lock"), wait_s=SHORT_WAIT_S):  # shards of one array job add their rows
        merged = {row["case_id"]: tuple(row[key] for key in ID_MAP_COLUMNS) for row in read_id_map(path)}
        merged.update({row[0]: row for row in rows})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(ID_MAP_COLUMNS)
        writer.writerows(merged[key] for key in sorted(merged))
        write_text(path, text.getvalue(), mode=0o600)


def read_id_map(path: Path) -> list[dict[str, str]]:
    """Rows of an id map; empty if there is no such file.

    Raises
    ------
    InputError
        If it is another kind of file.
    """
    import csv

    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as an id map: {error}") from error
    if any(not isinstance(row.get(key), str) for row in rows for key in ID_MAP_COLUMNS):
        raise InputError(f"{path} is no id map: its columns are {', '.join(ID_MAP_COLUMNS)}")
    return rows
