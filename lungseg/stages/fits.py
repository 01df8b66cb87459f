"""Fits of the clustering on disk: a folder of the store, or a bundle with the model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.diffusion.checkpoint import Student, read_model_file, save_model
from lungseg.errors import InputError, MismatchError
from lungseg.models import STARTER, starter_path
from lungseg.segmentation.anchored import AnchoredFit
from lungseg.segmentation.baselines import KMeansFit
from lungseg.segmentation.clustering import Clustering, TissueVotes
from lungseg.segmentation.density import TokenStatistics
from lungseg.segmentation.mixture import MixtureFit
from lungseg.segmentation.naming import ComponentName
from lungseg.segmentation.spherical import SphericalFit
from lungseg.store.atomic import atomic_path, read_json, write_json
from lungseg.tissue import TISSUES, tissue_by_name

KINDS: Mapping[str, type[Any]] = {
    "gmm": MixtureFit,
    "kmeans": KMeansFit,
    "anchored": AnchoredFit,
    "vmf": SphericalFit,
    "rules": TissueVotes,
}
"""Kind of a clustering -> its class."""
STATISTICS_KINDS = ("anchored",)
"""Kinds that look at the HU statistics of a token too."""
TOKEN_SCALE = "token_scale"
"""Name of the factors of the token's channels among the arrays of a fit."""


@dataclass(frozen=True)
class NamedFit:
    """A fitted clustering with the tissue of each component."""

    mixture: Clustering
    names: tuple[ComponentName, ...]
    provenance: dict[str, Any]
    token_scale: np.ndarray | None = None
    """float32 (C,): factor of each channel of a token, where blocks side by side are brought to the same weight."""

    @property
    def needs_statistics(self) -> bool:
        """Whether ``posterior`` needs the HU statistics of the tokens."""
        return self.mixture.kind in STATISTICS_KINDS

    def posterior(self, tokens: np.ndarray, statistics: TokenStatistics | None = None) -> np.ndarray:
        """Posterior float32 (N, K) of tokens (N, C) as their source gives them."""
        scaled = tokens if self.token_scale is None else tokens * self.token_scale
        return self.mixture.posterior(scaled, statistics)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays of the clustering and the factors, by name."""
        scale = {} if self.token_scale is None else {TOKEN_SCALE: self.token_scale}
        return {name: np.ascontiguousarray(array) for name, array in {**self.mixture.to_arrays(), **scale}.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the arrays and the names."""
        digest = hashlib.sha256(repr([(n.component, int(n.tissue)) for n in self.names]).encode())
        for name, array in sorted(self.to_arrays().items()):
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()


def fitted_settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Settings a fit was made with; the first ones knew windows and one method only."""
    return {
        "encoding": "windows",
        "method": "diffseglung",
        "mixture": "gmm",
        "token_stride": None,
        **provenance["config"],
    }


def find_model(path: Path) -> Path:
    """The model file of a training run, or the file itself; `starter` is the shipped model unless a file is so named.

    Raises
    ------
    InputError
        If there is none, saying how to get one.
    """
    if str(path) == STARTER and not path.exists():
        path = starter_path()
        if not path.is_file():
            raise InputError("this installation ships no starter model: give --model FILE, or train one")
    if path.is_dir():
        for name in ("model.safetensors", "bundle.safetensors"):
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path} holds no model.safetensors: the training is not finished; run the same command again")
    if not path.is_file():
        raise InputError(f"{path}: no such model; make one with: lungseg train-ddpm STORE -o RUN")
    return path


def _fit_json(fitted: NamedFit) -> dict[str, Any]:
    """What ``clusters.json`` says."""
    return {"kind": fitted.mixture.kind, "provenance": fitted.provenance, "components": components(fitted)}


def components(fitted: NamedFit) -> list[dict[str, Any]]:
    """Every component's name, statistics and the rule that fired, as JSON types."""
    rows = []
    for name in fitted.names:
        row = {key: _json_number(value) for key, value in vars(name).items() if key not in ("tissue", "votes")}
        votes = {TISSUES[tissue].name: round(float(share), 6) for tissue, share in name.votes.items()}
        rows.append({**row, "tissue": TISSUES[name.tissue].name, "votes": votes})
    return rows


def _json_number(value: Any) -> Any:
    return (None if np.isnan(value) else float(value)) if isinstance(value, (float, np.floating)) else value


def _fit_from(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> NamedFit:
    names = []
    for row in description["components"]:
        values: dict[str, Any] = {key: float("nan") if value is None else value for key, value in row.items()}
        votes = {tissue_by_name(key): share for key, share in row["votes"].items()}
        names.append(ComponentName(**{**values, "tissue": tissue_by_name(row["tissue"]), "votes": votes}))
    kind = description.get("kind", "gmm")
    if kind not in KINDS:
        raise MismatchError(f"a fit of kind '{kind}' is of a newer lungseg; this one knows {', '.join(KINDS)}")
    own = {name: array for name, array in arrays.items() if name != TOKEN_SCALE}
    provenance = dict(description["provenance"])
    return NamedFit(KINDS[kind].from_arrays(own), tuple(names), provenance, arrays.get(TOKEN_SCALE))


def write_fit(folder: Path, fitted: NamedFit, pictures: Mapping[str, bytes] | None = None) -> None:
    """Write a fit as a folder ``fits/<name>``, with pictures by their file names, whole or not at all."""
    from safetensors.numpy import save

    with atomic_path(folder) as partial:
        partial.mkdir()
        (partial / "mixture.safetensors").write_bytes(save(fitted.to_arrays()))
        write_json(partial / "clusters.json", _fit_json(fitted))
        for name, picture in (pictures or {}).items():
            (partial / name).write_bytes(picture)


def load_fit(path: Path) -> NamedFit:
    """A fitted clustering: folder ``fits/<name>`` of a store, or a bundle.

    Raises
    ------
    MismatchError
        If a model file without a fit is given.
    StoreError
        If files are missing or damaged.
    """
    if path.is_dir() and (path / "clusters.json").exists():
        from safetensors.numpy import load_file

        return _fit_from(read_json(path / "clusters.json"), load_file(path / "mixture.safetensors"))
    metadata, tensors = read_model_file(find_model(path))
    if not metadata["extra"]:
        raise MismatchError(f"{path} holds a model but no fit: run lungseg cluster STORE --model {path} --bundle FILE")
    arrays = {name.removeprefix("fit."): t.numpy() for name, t in tensors.items() if name.startswith("fit.")}
    return _fit_from(metadata["extra"], arrays)


def write_bundle(path: Path, model: Path, student: Student, fitted: NamedFit) -> None:
    """Write model and fit into one file, for people to share."""
    import torch

    _, tensors = read_model_file(model)
    weights = {name: t for name, t in tensors.items() if not name.startswith("fit.")}
    extra = {f"fit.{name}": torch.from_numpy(array) for name, array in fitted.to_arrays().items()}
    # this file is shared: how many cases, and which by fingerprint, but not their ids
    marks = fitted.provenance["inputs"]
    inputs = {key: mark for key, mark in marks.items() if key not in ("model", "standardisation")}
    kept = {key: marks[key] for key in ("model", "standardisation") if key in marks}
    shared = {**fitted.provenance, "inputs": {**kept, "tokens": sorted(inputs.values())}}
    description = _fit_json(dataclasses.replace(fitted, provenance=shared))
    save_model(path, weights, config=student.config, card=student.card, extra_tensors=extra, extra=description)


def names_table(fitted: NamedFit) -> Any:
    """Table of the components for the terminal."""
    from rich.table import Table

    table = Table(title=f"{fitted.mixture.num_components} components")
    for column in ("component", "tissue", "share", "median HU", "25th pct.", "LAA-950", "local SD", "votes"):
        table.add_column(column, justify="left" if column == "tissue" else "right")
    for name in fitted.names:
        table.add_row(
            str(name.component),
            TISSUES[name.tissue].title,
            f"{100 * name.weight:.1f} %",
            f"{name.median_hu:.0f}",
            f"{name.p25_hu:.0f}",
            f"{100 * name.laa950_share:.0f} %",
            f"{name.local_sd_hu:.0f}",
            f"{100 * max(name.votes.values(), default=0.0):.0f} %",
        )
    return table
