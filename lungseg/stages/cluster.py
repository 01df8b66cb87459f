"""``lungseg cluster``: tokens of the student, one Gaussian mixture for the cohort, and a name for each component."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lungseg.config.cluster import ClusterConfig
from lungseg.config.execution import Execution, resolve_device
from lungseg.config.fields import to_dict
from lungseg.diffusion.checkpoint import Student, load_student
from lungseg.errors import MismatchError
from lungseg.segmentation.density import (
    TokenStatistics,
    healthy_mode_hu,
    smooth_hu,
    token_statistics,
)
from lungseg.segmentation.encoding import encode_lung, resolve_encoding
from lungseg.segmentation.lattice import token_mask_fraction
from lungseg.segmentation.mixture import fit_mixture
from lungseg.segmentation.naming import (
    NamingRule,
    name_components,
    name_tokens,
    renumbered,
)
from lungseg.stages.cohort import DONE, SKIPPED, CaseOutcome, StageResult, limited_threads, run_cases
from lungseg.stages.extract_radiomics import training_cases
from lungseg.stages.fits import (
    NamedFit,
    find_model,
    fitted_settings,
    load_fit,
    names_table,
    write_bundle,
    write_fit,
)
from lungseg.store.atomic import read_json
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.reader import Artefact
from lungseg.store.schema import check_current, make_provenance, write_artefact
from lungseg.tissue import TISSUES

log = logging.getLogger(__name__)

_TOKEN_SETTINGS = (
    "timesteps", "combine", "encoding", "overlap", "window_sigma", "min_window_lung", "min_token_lung", "seed",
)  # fmt: skip
"""Settings the tokens depend on."""
_SAMPLE_SETTINGS = (*_TOKEN_SETTINGS, "tokens_per_case", "naming_window", "naming_sigma_mm")
_FIT_SETTINGS = tuple(
    f.name for f in dataclasses.fields(ClusterConfig) if f.name not in ("name", "batch_size", "slab_gib")
)
_STATISTICS = tuple(field.name for field in dataclasses.fields(TokenStatistics))


def cluster(
    store: Store | Path | str,
    model: Path | str,
    config: ClusterConfig = ClusterConfig(),
    *,
    fit: Path | None = None,
    bundle: Path | None = None,
    fit_only: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Fit a mixture on the cohort's tokens (or take ``fit``) and write each case's posteriors.

    Parameters
    ----------
    store : Store or path
    model : path
        ``model.safetensors``, a bundle, or a training run.
    config : ClusterConfig
    fit : path, optional
        Bundle, or folder ``fits/<name>``: applied as it is, nothing is fitted.
    bundle : path, optional
        Model and fit are also written into this one file.
    fit_only : bool
        Stop after the fit.

    Raises
    ------
    MismatchError
        If model, store and fit do not belong together, or results of other settings exist.
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    case_ids = store.require_cases()
    device = resolve_device(execution.device)
    model_path = find_model(Path(model))
    student = load_student(model_path)
    store.check_uniform(case_ids)
    check_model(store, student, config.timesteps)
    config = dataclasses.replace(config, encoding=resolve_encoding(student, config.encoding))
    outcomes: tuple[CaseOutcome, ...] = ()
    if fit is not None:
        fitted = load_fit(Path(fit))
        _check_fit(fitted, student, config, Path(fit))
    else:
        training = training_cases(store, case_ids)
        outcomes = run_cases(
            _sample_one, training, store, model_path, config, device, execution.overwrite,
            names=training, title="cluster (tokens)", execution=execution,
        )  # fmt: skip
        sampled = StageResult("cluster", store.path, outcomes)
        if execution.shard:
            note = "this shard's tokens are sampled; then fit without --shard, and apply with --fit and --shard"
            return dataclasses.replace(sampled, notes=(note,))
        if not sampled.complete():
            sampled.require_complete()
        fitted = _fit(store, sampled.complete(), student, config, execution)
    if bundle is not None:
        write_bundle(Path(bundle), model_path, student, fitted)
    notes = (f"fit: {store.fit_dir(config.run_name)}",) if fit is None else ()
    if fit_only:
        return StageResult("cluster", store.path, outcomes, tables=(names_table(fitted),), notes=notes)
    unsampled = {o.case_id: o for o in outcomes if o.status not in (DONE, SKIPPED)}
    outcomes = run_cases(
        _apply_one, case_ids, store, model_path, fitted, config, device, execution.overwrite,
        names=case_ids, title="cluster", execution=execution,
    )  # fmt: skip
    outcomes = tuple(unsampled.get(o.case_id, o) if o.status in (DONE, SKIPPED) else o for o in outcomes)
    return StageResult("cluster", store.path, outcomes, tables=(names_table(fitted),), notes=notes)


def _check_fit(fitted: NamedFit, student: Student, config: ClusterConfig, path: Path) -> None:
    """Refuse a fit of another model, or of tokens made with other settings."""
    if fitted.provenance["inputs"].get("model") != student.fingerprint:
        raise MismatchError(f"the fit {path} belongs to another model than the one given with --model")
    made, wanted = fitted_settings(fitted.provenance), to_dict(config)
    differing = [
        f"{key}: fitted with {made.get(key)}, now {wanted[key]}"
        for key in _TOKEN_SETTINGS
        if made.get(key) != wanted[key]
    ]
    if differing:
        raise MismatchError(f"the fit {path} needs tokens made as its own were ({'; '.join(differing)})")


def check_model(store: Store, student: Student, timesteps: Sequence[int]) -> None:
    """Refuse a store of another spacing than the model's, and noise levels that its diffusion does not have.

    Raises
    ------
    MismatchError
        Saying which, and what to do.
    """
    spacing, trained = float(store.header["config"]["spacing_mm"]), float(student.card["spacing_mm"])
    if abs(spacing - trained) > 1e-6:
        raise MismatchError(
            f"the model was trained at {trained} mm, store {store.path} has {spacing} mm: "
            f"make the store with --spacing-mm {trained}"
        )
    beyond = [t for t in timesteps if t > student.schedule.num_steps]
    if beyond:
        raise MismatchError(f"--timesteps {beyond}: the model's diffusion has {student.schedule.num_steps} steps")


_STUDENTS: dict[tuple[Path, str, int], Student] = {}


def _student(path: Path, device: str) -> Student:
    """The model, loaded once per process and version of the file."""
    key = (path, device, path.stat().st_mtime_ns)
    if key not in _STUDENTS:
        _STUDENTS.clear()
        _STUDENTS[key] = load_student(path, device=device)
    return _STUDENTS[key]


def case_tokens(volume: Artefact, student: Student, config: ClusterConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one case and which of them can be used; see :func:`encode_lung`."""
    return encode_lung(volume.read("image"), volume.read("mask") > 0, student, config)


def _sample_one(
    case_id: str, store: Store, model: Path, config: ClusterConfig, device: str, overwrite: bool
) -> tuple[str, str]:
    """Write ``tokens.<name>.h5``: a bounded random sample of one case's tokens with their HU statistics."""
    student = _student(model, device)
    path = store.case_file(case_id, "tokens", config.run_name)
    with lock(store.lock_file(case_id, f"tokens.{config.run_name}")), store.open(case_id, "volume") as volume:
        settings = {key: value for key, value in to_dict(config).items() if key in _SAMPLE_SETTINGS}
        inputs = {"volume.h5": volume.fingerprint, "model": student.fingerprint}
        wanted = make_provenance("cluster", settings, inputs=inputs, statistics=list(_STATISTICS))
        if store.is_done(path, "tokens", wanted, overwrite=overwrite):
            return SKIPPED, ""
        mask, p = volume.read("mask") > 0, student.config.token_size
        features, usable = case_tokens(volume, student, config)
        index = np.argwhere(usable & (token_mask_fraction(mask, p) >= config.min_token_lung))
        rng = np.random.Generator(np.random.Philox(_seed_of(config.seed, case_id)))
        # in random order: the fit takes the first ones of each case when there are too many
        index = rng.permutation(index)[: config.tokens_per_case].astype(np.int32)
        image, grid = volume.read("image"), volume.provenance["grid"]
        spacing = cast("tuple[float, float, float]", tuple(grid["spacing_mm"]))
        sigma = config.naming_sigma_mm / spacing[0]
        statistics = token_statistics(
            image, mask, index, token_size=p, window=config.naming_window, spacing_mm=spacing, smoothing_voxels=sigma
        )
        mode = healthy_mode_hu(smooth_hu(image, mask, sigma), mask)
        datasets = {
            "index": index,
            "features": np.ascontiguousarray(features[:, *index.T].T),
            "statistics": np.stack([getattr(statistics, name) for name in _STATISTICS], axis=1).astype(np.float32),
        }
        write_artefact(path, "tokens", datasets, provenance={**wanted, "healthy_mode_hu": mode})
    return DONE, "" if len(index) else "no token with enough lung"


def _seed_of(seed: int, case_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{case_id}".encode()).digest()[:8], "little")


def _fit(store: Store, case_ids: list[str], student: Student, config: ClusterConfig, execution: Execution) -> NamedFit:
    """Fit and name the mixture, or load the one made before with the same settings and tokens."""
    folder = store.fit_dir(config.run_name)
    with lock(store.path / f"fits.{config.run_name}.lock"), limited_threads(execution.threads):
        samples = {}
        for case_id in case_ids:
            with store.open(case_id, "tokens", config.run_name) as sample:
                samples[case_id] = sample.fingerprint
        settings = {key: value for key, value in to_dict(config).items() if key in _FIT_SETTINGS}
        wanted = make_provenance("cluster", settings, inputs={**samples, "model": student.fingerprint})
        if (folder / "clusters.json").exists():
            try:
                check_current(read_json(folder / "clusters.json")["provenance"], wanted, what=str(folder))
                return load_fit(folder)
            except MismatchError:
                if not execution.overwrite:
                    raise
        fitted = _fit_tokens(store, case_ids, config, wanted)
        write_fit(folder, fitted)
    return fitted


def _fit_tokens(store: Store, case_ids: list[str], config: ClusterConfig, provenance: dict[str, Any]) -> NamedFit:
    """Mixture over equally many tokens per case, named by what its members look like."""
    share = max(1, config.max_tokens // len(case_ids))
    tokens, statistics, named = [], [], []
    for case_id in case_ids:
        with store.open(case_id, "tokens", config.run_name) as sample:
            tokens.append(sample.read("features")[:share])
            stats = _statistics(sample.read("statistics")[:share])
            mode = sample.provenance["healthy_mode_hu"]
        statistics.append(stats)
        named.append(name_tokens(stats, healthy_mode_hu=mode))
    joined = np.concatenate(tokens)
    log.info("cluster: fitting %d components on %d tokens", config.components, len(joined))
    mixture = fit_mixture(
        joined,
        num_components=config.components,
        pca_components=config.pca,
        whiten=config.whiten,
        standardise=config.standardise,
        regularisation=config.regularisation,
        restarts=config.restarts,
        max_iterations=config.iterations,
        seed=config.seed,
    )
    log.info("cluster: effective rank %.1f, converged %s", mixture.effective_rank, mixture.converged)
    names = name_components(
        mixture.posterior(joined), np.concatenate(named), _join(statistics), rule=cast(NamingRule, config.naming)
    )
    mixture = mixture.reorder([name.component for name in names])
    return NamedFit(mixture, tuple(renumbered(names)), provenance)


def _statistics(table: np.ndarray) -> TokenStatistics:
    columns = {name: table[:, i] for i, name in enumerate(_STATISTICS)}
    columns["num_voxels"] = columns["num_voxels"].astype(np.int32)
    return TokenStatistics(**columns)


def _join(parts: list[TokenStatistics]) -> TokenStatistics:
    return TokenStatistics(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _STATISTICS})


def _apply_one(
    case_id: str,
    store: Store,
    model: Path,
    fitted: NamedFit,
    config: ClusterConfig,
    device: str,
    overwrite: bool,
) -> tuple[str, str]:
    """Write ``clusters.<name>.h5``: posteriors of the components on the token lattice."""
    student = _student(model, device)
    path = store.case_file(case_id, "clusters", config.run_name)
    with lock(store.lock_file(case_id, f"clusters.{config.run_name}")), store.open(case_id, "volume") as volume:
        settings = {key: value for key, value in to_dict(config).items() if key in _TOKEN_SETTINGS}
        inputs = {
            "volume.h5": volume.fingerprint,
            "model": student.fingerprint,
            "fit": fitted.fingerprint,
        }
        extra = {
            "token_size": student.config.token_size,
            "tissues": [TISSUES[name.tissue].name for name in fitted.names],
        }
        wanted = make_provenance("cluster", settings, inputs=inputs, **extra)
        if store.is_done(path, "clusters", wanted, overwrite=overwrite):
            return SKIPPED, ""
        features, usable = case_tokens(volume, student, config)
        posterior = np.zeros((fitted.mixture.num_components, *usable.shape), dtype=np.float16)
        if usable.any():
            posterior[:, usable] = fitted.mixture.posterior(np.ascontiguousarray(features[:, usable].T)).T
        datasets = {"posterior": posterior, "coverage": usable.astype(np.uint8)}
        write_artefact(path, "clusters", datasets, provenance=wanted)
    return DONE, "" if usable.any() else "no lung: nothing to cluster"
