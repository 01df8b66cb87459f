"""Does a store hold what it says? Every file opened, every checksum read, every fingerprint computed again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lungseg.errors import LungsegError, StoreError
from lungseg.store.atomic import read_json
from lungseg.store.cases import Store
from lungseg.store.reader import Artefact
from lungseg.store.schema import SCHEMA, fingerprint

RERUN = "delete it and run its stage again"


@dataclass(frozen=True)
class Finding:
    """Result of checking one file."""

    path: Path
    problem: str
    """Empty if the file is sound."""
    fix: str = ""


def verify_store(store: Store) -> Iterator[Finding]:
    """Check every file of a store, one finding a file, sound ones included.

    Checked: schema, HDF5 checksums, fingerprints, and that each file was made from the present version of its
    inputs within the same case; fits can be read; partial files of killed runs are reported with their cure.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for path in store.leftovers():
        yield Finding(path, "left by an interrupted run", "run the same command again, or delete it")
    for case_dir in sorted((store.path / "cases").glob("*")):
        files = sorted(case_dir.glob("*.h5"))
        marks: dict[str, str] = {}
        for path in sorted(files, key=lambda p: p.name != "volume.h5"):
            yield _verify_file(path, marks)
    for path in sorted(store.path.glob("fits/*/*.json")) + sorted(store.path.glob("standardisation.json")):
        try:
            read_json(path)
            yield Finding(path, "")
        except StoreError as error:
            yield Finding(path, str(error), RERUN)
    for path in sorted(store.path.glob("fits/*/*.safetensors")):
        try:
            load_file(path)
            yield Finding(path, "")
        except (SafetensorError, OSError) as error:
            yield Finding(path, f"{path} is damaged: {error}", RERUN)


def _verify_file(path: Path, marks: dict[str, str]) -> Finding:
    kind = path.name.split(".")[0]
    if kind not in SCHEMA:
        return Finding(path, "not a file of the store's layout", "move it elsewhere")
    try:
        with Artefact(path, kind) as artefact:
            names = artefact.names()
            content = {name: artefact.read(name) for name in names}
            if fingerprint(kind, artefact.provenance, content) != artefact.fingerprint:
                return Finding(path, "content does not match its fingerprint", RERUN)
            marks[path.name] = artefact.fingerprint
            for source, mark in artefact.provenance["inputs"].items():
                if source.endswith(".h5") and not (path.parent / source).exists():
                    return Finding(path, f"made from {source}, which is missing", f"make {source} again, or {RERUN}")
                if source in marks and marks[source] != mark:
                    return Finding(path, f"made from another {source} than the one beside it", RERUN)
    except (LungsegError, KeyError, ValueError) as error:
        return Finding(path, str(error), RERUN)
    return Finding(path, "")
