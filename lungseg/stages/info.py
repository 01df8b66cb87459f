"""``lungseg info``: what an artefact is and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lungseg.config.execution import Execution
from lungseg.errors import InputError
from lungseg.models import STARTER
from lungseg.stages.cohort import StageResult
from lungseg.store.atomic import read_json
from lungseg.store.cases import Store
from lungseg.store.reader import Artefact
from lungseg.store.schema import SCHEMA

FOR_FEATURES = "encoder, middle and heads, for cluster and run; no decoder, which synthesize needs"


def info(artefact: Path, *, execution: Execution = Execution()) -> StageResult:
    """Describe a store, a file of one, a fit, a training run, a model, a bundle, the shipped `starter`, or a scan.

    Raises
    ------
    InputError
        If ``artefact`` is none of these.
    """
    from rich.table import Table

    path = Path(artefact)
    kind, rows = _describe(path)
    table = Table(title=f"{path.name or path}: {kind}", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for key, value in rows:
        table.add_row(key, value)
    return StageResult("info", path, tables=(table,), values=dict(rows))


def _describe(path: Path) -> tuple[str, list[tuple[str, str]]]:
    if str(path) == STARTER and not path.exists():
        from lungseg.stages.fits import find_model

        return _model(find_model(path))
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / "store.json").is_file():
        return "patch store", list(_store(Store(path)))
    if (path / "clusters.json").is_file():
        return "fitted clustering", list(_fit(path))
    if (path / "config.json").is_file():
        return "training run", list(_run(path))
    if path.suffix == ".safetensors":
        return _model(path)
    if path.suffix == ".h5":
        return f"{path.name.split('.')[0]} of a case", list(_artefact(path))
    return "scan", list(_scan(path))


def _store(store: Store) -> Iterator[tuple[str, str]]:
    yield "made by", f"lungseg {store.header['lungseg_version']}, format {store.header['format_version']}"
    yield "holds", str(store.header["provenance"])
    yield "cases", str(len(store.case_ids()))
    for kind in SCHEMA:
        names: dict[str, int] = {}
        for path in store.path.glob(f"cases/*/{kind}.*h5"):
            names[path.name] = names.get(path.name, 0) + 1
        for name, count in sorted(names.items()):
            yield name, f"{count} cases"
    for folder in sorted(store.path.glob("fits/*")):
        yield "fit", folder.name
    yield "settings", _json({key: value for key, value in store.header["config"].items() if key != "salt"})


def _fit(path: Path) -> Iterator[tuple[str, str]]:
    description = read_json(path / "clusters.json")
    for component in description["components"]:
        share, rule = 100 * component["weight"], component["rule"]
        yield f"component {component['component']}", f"{component['tissue']}, {share:.1f} % of tokens: {rule}"
    yield "settings", _json(description["provenance"]["config"])


def _run(path: Path) -> Iterator[tuple[str, str]]:
    header = read_json(path / "config.json")
    if not isinstance(header, dict) or header.get("format") != "lungseg-run":
        raise InputError(f"{path}: its config.json is not that of a training run")
    lines = (path / "stats.jsonl").read_text(encoding="utf-8").splitlines() if (path / "stats.jsonl").exists() else []
    done = (path / "model.safetensors").exists()
    yield "state", "complete" if done else "unfinished: run the same train-ddpm command again"
    if lines:
        last = json.loads(lines[-1])
        yield "images", f"{last['images']} of {header['config']['total_images']}"
        yield "last losses", ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k != "images" and v is not None)
    yield "cases", str(len(set(header["inputs"]) - {"standardisation"}))
    yield "environment", _json(header["environment"])
    yield "settings", _json(header["config"])


def _model(path: Path) -> tuple[str, list[tuple[str, str]]]:
    from lungseg.diffusion.checkpoint import read_model_file

    metadata, tensors = read_model_file(path)
    card = {key: value for key, value in metadata["card"].items() if key not in ("training_volumes", "standardisation")}
    rows = [
        ("made by", f"lungseg {metadata['lungseg_version']}"),
        ("holds", "encoder, middle, heads and decoder" if metadata.get("decoder", True) else FOR_FEATURES),
        ("parameters", f"{sum(t.numel() for n, t in tensors.items() if not n.startswith('fit.')):,}"),
        ("HU window", _json(metadata["hu_window"])),
        *((key, str(value) if not isinstance(value, dict) else _json(value)) for key, value in card.items()),
        ("settings", _json(metadata["config"])),
    ]
    if metadata["extra"]:
        rows.append(("fit", f"{len(metadata['extra']['components'])} named components"))
    return "model with fit" if metadata["extra"] else "model", rows


def _artefact(path: Path) -> Iterator[tuple[str, str]]:
    kind = path.name.split(".")[0]
    if kind not in SCHEMA:
        raise InputError(f"{path}: not a file of a patch store (those are named {', '.join(sorted(SCHEMA))})")
    with Artefact(path, kind) as artefact:
        for name in artefact.names():
            yield name, " x ".join(str(n) for n in artefact.shape(name))
        for key, value in artefact.provenance.items():
            yield key, value if isinstance(value, str) else _json(value)
        yield "fingerprint", artefact.fingerprint


def _scan(path: Path) -> Iterator[tuple[str, str]]:
    from lungseg.scan.sources import find_sources

    sources = find_sources([path])
    if len(sources) == 1 and sources[0].problem:
        raise InputError(sources[0].problem)
    for number, source in enumerate(sources, start=1):
        try:
            volume = source.read()
        except InputError as error:
            yield f"scan {number}", f"cannot be used: {error}"
            continue
        grid = volume.geometry
        yield f"scan {number}", " x ".join(str(n) for n in grid.shape) + " voxels (z,y,x)"
        yield "spacing", " x ".join(f"{s:.4g}" for s in grid.spacing_mm) + " mm"
        yield "HU", f"{volume.array.min()} to {volume.array.max()}"
        yield "acquisition", _json(volume.acquisition)
        for note in (*volume.notes, *source.others):
            yield "note", note


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
