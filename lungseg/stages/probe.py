"""``lungseg probe``: which noise level and block of a model tell tissue apart, without a label."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lungseg.config.execution import Execution, resolve_device
from lungseg.config.fields import to_dict
from lungseg.config.probe import ProbeConfig
from lungseg.diffusion.checkpoint import Student, load_student
from lungseg.diffusion.tokens import EMBEDDING, NoiseField, token_activations
from lungseg.diffusion.unet import MIDDLE
from lungseg.errors import InputError, UsageError
from lungseg.segmentation.density import token_statistics
from lungseg.segmentation.feature_scores import FeatureScores, score_features
from lungseg.segmentation.lattice import pad_volume, padded_shape, token_mask_fraction, window_corners
from lungseg.stages.cluster import check_model
from lungseg.stages.cohort import DONE, StageResult, run_cases
from lungseg.stages.extract_radiomics import training_cases
from lungseg.stages.fits import find_model
from lungseg.store.atomic import write_json
from lungseg.store.cases import Store
from lungseg.store.patches import mask_fractions

MIN_WINDOW_LUNG = 0.5
"""Windows are taken where at least this share is lung, as in training; if there is none, where there is most."""
_SCORES = {
    "silhouette": "silhouette",
    "hu_separability": "HU sep.",
    "texture_separability": "texture sep.",
    "effective_rank": "eff. rank",
}
"""Columns of the table."""


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Tokens of one case: features by (timestep, block), and what the lung is like there."""

    features: dict[tuple[int, str], np.ndarray]
    median_hu: np.ndarray
    local_sd_hu: np.ndarray


def probe(
    model: Path | str,
    store: Store | Path | str,
    config: ProbeConfig = ProbeConfig(),
    *,
    output: Path | None = None,
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Score the features of every noise level and block of a model on the training cases of a store.

    Features of all blocks are compared on the same tokens: maps finer than a token are averaged over its cell.

    Parameters
    ----------
    model : path
        Training run, model.safetensors, or bundle.
    store : Store or path
    config : ProbeConfig
    output : path, optional
        JSON file to write.
    as_json : bool
        Give the JSON instead of the table.

    Returns
    -------
    StageResult
        ``values["scores"]`` holds one dict per (timestep, block).

    Raises
    ------
    UsageError
        For a block or noise level the model does not have.
    InputError
        If there are too few tokens.
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    model_path = find_model(Path(model))
    student = load_student(model_path)
    case_ids = training_cases(store, store.require_cases())
    store.check_uniform(case_ids)
    check_model(store, student, config.timesteps)
    blocks = _blocks(student, config)
    outcomes = run_cases(
        _sample, case_ids, store, model_path, config, blocks, resolve_device(execution.device),
        names=case_ids, title="probe", execution=execution,
    )  # fmt: skip
    result = StageResult("probe", store.path, tuple(dataclasses.replace(o, value=None) for o in outcomes))
    samples = [o.value for o in outcomes if o.status == DONE]
    if not samples:
        result.require_complete()
    rows = _score(samples, config, blocks)
    document = {"model": student.fingerprint, "config": to_dict(config), "cases": len(samples), "scores": rows}
    if output is not None:
        write_json(Path(output), document)
    return dataclasses.replace(
        result, tables=(_table(rows),), values={"scores": rows}, document=document if as_json else None
    )


def _blocks(student: Student, config: ProbeConfig) -> tuple[str, ...]:
    names = student.unet.spec.block_names
    encoder = names[: names.index(MIDDLE) + 1]
    unknown = [name for name in config.blocks if name not in (*names, EMBEDDING)]
    if unknown:
        raise UsageError(f"--blocks {','.join(unknown)}: this model has {', '.join((*names, EMBEDDING))}")
    return config.blocks or (*encoder, EMBEDDING)


def _sample(
    case_id: str, store: Store, model: Path, config: ProbeConfig, blocks: Sequence[str], device: str
) -> tuple[str, str, _Sample]:
    """Tokens of some windows of one case, at all noise levels and blocks."""
    student = load_student(model, device=device)
    with store.open(case_id, "volume") as volume:
        image, mask = volume.read("image"), volume.read("mask") > 0
        spacing = cast("tuple[float, float, float]", tuple(volume.provenance["grid"]["spacing_mm"]))
    digest = hashlib.sha256(f"{config.seed}/{case_id}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))
    corners, index = _choose(mask, student, config, rng)
    features = _encode(image, mask, student.for_volume(image), config, blocks, corners, index)
    p = student.config.token_size
    lattice = np.concatenate([corner // p + own for corner, own in zip(corners, index, strict=True)])
    statistics = token_statistics(
        image, mask, lattice, token_size=p, window=config.statistics_window, spacing_mm=spacing
    )
    return DONE, "", _Sample(features, statistics.median_hu, statistics.local_sd_median)


def _choose(
    mask: np.ndarray, student: Student, config: ProbeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Corners (n, 3) of windows on the token lattice, and the tokens (m, 3) to keep of each."""
    patch, p = student.config.patch_size, student.config.token_size
    target = padded_shape(mask.shape, patch, p)
    padded = np.pad(mask, [(0, t - n) for t, n in zip(target, mask.shape, strict=True)])
    corners = window_corners(target, patch, patch, token_size=p)
    share = mask_fractions(padded, corners, patch)
    full = np.flatnonzero(share >= MIN_WINDOW_LUNG)
    chosen = rng.permutation(full)[: config.windows_per_case] if len(full) else np.argsort(-share, kind="stable")[:1]
    corners = corners[np.sort(chosen)]
    lung = token_mask_fraction(padded, p)
    kept = []
    per_window = -(-config.tokens_per_case // len(corners))
    for corner in corners:
        cells = tuple(slice(c // p, (c + n) // p) for c, n in zip(corner, patch, strict=True))
        index = np.argwhere(lung[cells] >= max(config.min_token_lung, 1e-9))
        kept.append(rng.permutation(index)[:per_window])
    if not sum(map(len, kept)):
        raise InputError("no token with enough lung: lower --min-token-lung, or look at the lung mask")
    return corners, kept


def _encode(
    image: np.ndarray,
    mask: np.ndarray,
    student: Student,
    config: ProbeConfig,
    blocks: Sequence[str],
    corners: np.ndarray,
    index: Sequence[np.ndarray],
) -> dict[tuple[int, str], np.ndarray]:
    """Features (M, C) of the chosen tokens, by (timestep, block)."""
    patch, p = student.config.patch_size, student.config.token_size
    target = padded_shape(image.shape, patch, p)
    image, mask = pad_volume(image, target), np.pad(mask, [(0, t - n) for t, n in zip(target, mask.shape, strict=True)])
    noise = NoiseField(config.seed, (target[1], target[2]))
    parts: dict[tuple[int, str], list[np.ndarray]] = {(t, name): [] for t in config.timesteps for name in blocks}
    for start in range(0, len(corners), config.batch_size):
        part = corners[start : start + config.batch_size]
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, patch, strict=True)) for corner in part]
        hu, lung = np.stack([image[box] for box in boxes]), np.stack([mask[box] for box in boxes])
        for t in config.timesteps:
            found = token_activations(student, hu, lung, part, noise, timestep=t, blocks=blocks)
            for name in blocks:
                for i, own in enumerate(index[start : start + config.batch_size]):
                    parts[t, name].append(found[name][i][:, *own.T].T)
    return {key: np.concatenate(rows) for key, rows in parts.items()}


def _score(samples: Sequence[_Sample], config: ProbeConfig, blocks: Sequence[str]) -> list[dict[str, Any]]:
    median, texture = (np.concatenate([getattr(s, name) for s in samples]) for name in ("median_hu", "local_sd_hu"))
    rows = []
    for t in config.timesteps:
        for name in blocks:
            scores: FeatureScores = score_features(
                np.concatenate([sample.features[t, name] for sample in samples]),
                median,
                texture,
                clusters=config.clusters,
                pca=config.pca,
                max_silhouette=config.max_silhouette,
                seed=config.seed,
            )
            plain = {key: None if value != value else round(value, 6) for key, value in vars(scores).items()}
            rows.append({"timestep": t, "block": name, "tokens": len(median), **plain})
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    """Scores for the terminal; the best of each column is marked with a star."""
    from rich.table import Table

    table = Table(title=f"{rows[0]['tokens']} tokens, no labels; * best of its column")
    table.add_column("t", justify="right")
    table.add_column("block")
    best = {}
    for key, title in _SCORES.items():
        table.add_column(title, justify="right")
        best[key] = max((row[key] for row in rows if row[key] is not None), default=None)
    for row in rows:
        cells = [
            "-" if row[key] is None else f"{row[key]:.3f}{'*' if row[key] == best[key] else ' '}" for key in _SCORES
        ]
        table.add_row(str(row["timestep"]), row["block"], *cells)
    return table
