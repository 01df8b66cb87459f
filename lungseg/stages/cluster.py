"""``lungseg cluster``: tokens by the method asked for, one clustering for the cohort, a name for each component."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lungseg.config.cluster import RADIOMICS_METHODS, STUDENT_METHODS, UNFITTED_METHODS, VOXEL_METHODS, ClusterConfig
from lungseg.config.execution import Execution, resolve_device
from lungseg.errors import InputError, MismatchError, UsageError
from lungseg.radiomics.descriptor import Standardisation
from lungseg.segmentation.density import TokenStatistics
from lungseg.segmentation.encoding import resolve_encoding
from lungseg.segmentation.hu_anchors import refer_statistics
from lungseg.segmentation.lattice import lattice_shape
from lungseg.stages.cluster_fit import fit_cohort, sample_case
from lungseg.stages.cohort import DONE, SKIPPED, CaseOutcome, StageResult, run_cases
from lungseg.stages.extract_radiomics import (
    check_standardisation,
    find_training_cases,
    load_standardisation,
    training_cases,
)
from lungseg.stages.fits import (
    NamedFit,
    components,
    find_model,
    fitted_settings,
    load_fit,
    names_table,
    write_bundle,
)
from lungseg.stages.token_sources import (
    Scan,
    TokenPart,
    TokenSource,
    cached_student,
    check_model,
    open_source,
)
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, Tissue

__all__ = ["check_model", "cluster"]


def cluster(
    store: Store | Path | str,
    model: Path | str | None = None,
    config: ClusterConfig = ClusterConfig(),
    *,
    fit: Path | None = None,
    bundle: Path | None = None,
    fit_only: bool = False,
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Cluster the cohort's tokens (or take ``fit``) and write each case's posteriors.

    Parameters
    ----------
    store : Store or path
    model : path, optional
        ``model.safetensors``, a bundle, or a training run; needed by ``STUDENT_METHODS``, and ignored, with a note, by
        the others.
    config : ClusterConfig
        From ``make_config(ClusterConfig, method=...)``, which knows what a method changes.
    fit : path, optional
        Bundle, or folder ``fits/<name>``: applied as it is, nothing is fitted.
    bundle : path, optional
        Model and fit are also written into this one file.
    fit_only : bool
        Stop after the fit.
    as_json : bool
        The result's document holds the components and what became of each case.

    Raises
    ------
    UsageError
        If the settings contradict each other, or the method needs a model and there is none.
    MismatchError
        If model, store and fit do not belong together, or results of other settings exist.
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    if problems := config.check():
        raise UsageError("\n".join(problems))
    if bundle is not None and config.method not in STUDENT_METHODS:
        raise UsageError(
            f"--bundle holds a model with its fit, and --method {config.method} has no model: share the folder "
            f"{store.fit_dir(config.run_name)} instead, for --fit"
        )
    case_ids = store.require_cases()
    notes = []
    if config.method in STUDENT_METHODS and model is None:
        raise UsageError(f"--method {config.method} needs a trained model: give --model RUN, model.safetensors or FILE")
    if config.method not in STUDENT_METHODS and model is not None:
        notes.append(f"--model is not used: --method {config.method} needs none")
    fitted = load_fit(Path(fit)) if fit is not None else None
    source, config = _open(store, case_ids, model, config, fitted, execution)
    outcomes: tuple[CaseOutcome, ...] = ()
    if fitted is not None:
        _check_fit(fitted, source, store, Path(str(fit)))
    else:
        sampled_ids = _cases_to_sample(store, case_ids, config)
        outcomes = run_cases(
            sample_case, sampled_ids, store, source, execution.overwrite,
            names=sampled_ids, title="cluster (tokens)", execution=execution,
        )  # fmt: skip
        sampled = StageResult("cluster", store.path, outcomes)
        if execution.shard:
            note = "this shard's tokens are sampled; then fit without --shard, and apply with --fit and --shard"
            return dataclasses.replace(sampled, notes=(*notes, note))
        if not sampled.complete():
            sampled.require_complete()
        fitted = fit_cohort(store, sampled.complete(), source, execution)
        notes.append(f"fit: {store.fit_dir(config.run_name)}")
    if bundle is not None:
        assert source.model is not None
        write_bundle(Path(bundle), source.model, cached_student(source.model, source.device), fitted)
    if fit_only:
        return _result(store, outcomes, fitted, notes, as_json)
    unsampled = {o.case_id: o for o in outcomes if o.status not in (DONE, SKIPPED)}
    outcomes = run_cases(
        _apply_one, case_ids, store, source, fitted, execution.overwrite,
        names=case_ids, title="cluster", execution=execution,
    )  # fmt: skip
    outcomes = tuple(unsampled.get(o.case_id, o) if o.status in (DONE, SKIPPED) else o for o in outcomes)
    return _result(store, outcomes, fitted, notes, as_json)


def _result(
    store: Store, outcomes: tuple[CaseOutcome, ...], fitted: NamedFit, notes: list[str], as_json: bool
) -> StageResult:
    """What the command ends with: the table of the components, for people or for machines."""
    result = StageResult("cluster", store.path, outcomes, tables=(names_table(fitted),), notes=tuple(notes))
    return result.as_document(components=components(fitted)) if as_json else result


def _open(
    store: Store,
    case_ids: list[str],
    model: Path | str | None,
    config: ClusterConfig,
    fitted: NamedFit | None,
    execution: Execution,
) -> tuple[TokenSource, ClusterConfig]:
    """The token source of this store, and the configuration with what the model decides."""
    device = resolve_device(execution.device)
    store.check_uniform(case_ids)
    path = None
    if config.method in STUDENT_METHODS:
        assert model is not None
        path = find_model(Path(model))
        student = cached_student(path, device)
        check_model(store, student, config.timesteps)
        config = dataclasses.replace(config, encoding=resolve_encoding(student, config.encoding))
    standardisation = None
    if config.method in RADIOMICS_METHODS and config.method != "radiomics-kmeans":
        standardisation = _standardisation(store, case_ids, config, fitted)
    return open_source(config, device=device, model=path, standardisation=standardisation), config


def _standardisation(
    store: Store, case_ids: list[str], config: ClusterConfig, fitted: NamedFit | None
) -> Standardisation:
    """That of the fit, which its tokens were scaled with, or else the store's."""
    if fitted is not None and "standardisation" in fitted.provenance:
        return Standardisation.from_dict(fitted.provenance["standardisation"])
    found = load_standardisation(store, (config.radiomics_window,) * 3)
    check_standardisation(store, found, cases=find_training_cases(store, case_ids), mcc=True)
    return found


def _cases_to_sample(store: Store, case_ids: list[str], config: ClusterConfig) -> list[str]:
    """The training cases; where nothing is fitted the sample only describes, and any cases will do."""
    try:
        return training_cases(store, case_ids)
    except InputError:
        if config.method not in UNFITTED_METHODS:
            raise
        return case_ids


def _check_fit(fitted: NamedFit, source: TokenSource, store: Store, path: Path) -> None:
    """Refuse a fit of another model, of tokens made with other settings, or of another spacing."""
    made = fitted_settings(fitted.provenance)
    if made.get("method") != source.method:
        raise MismatchError(f"the fit {path} is of --method {made.get('method')}, not of {source.method}")
    if fitted.provenance["inputs"].get("model", "") != source.model_fingerprint:
        raise MismatchError(f"the fit {path} belongs to another model than the one given with --model")
    differing = [
        f"{key}: fitted with {made.get(key)}, now {value}"
        for key, value in source.settings().items()
        if made.get(key) != value
    ]
    if differing:
        raise MismatchError(f"the fit {path} needs tokens made as its own were ({'; '.join(differing)})")
    theirs, ours = fitted.provenance.get("spacing_mm"), store.header["config"].get("spacing_mm")
    if theirs is not None and theirs != ours and source.method not in VOXEL_METHODS:
        raise MismatchError(f"the fit {path} is of a store of {theirs} mm, store {store.path} has {ours} mm")


def _apply_one(case_id: str, store: Store, source: TokenSource, fitted: NamedFit, overwrite: bool) -> tuple[str, str]:
    """Write ``clusters.<name>.h5``: posteriors of the components on the lattice, of tissues where that is the grid."""
    name = source.config.run_name
    path = store.case_file(case_id, "clusters", name)
    with lock(store.lock_file(case_id, f"clusters.{name}")), store.open(case_id, "volume") as volume:
        inputs = {"volume.h5": volume.fingerprint, **source.inputs, "fit": fitted.fingerprint}
        joined = source.method in VOXEL_METHODS
        tissues = MIXTURE_TISSUES if joined else tuple(name.tissue for name in fitted.names)
        extra = {"token_size": source.cell, "tissues": [TISSUES[tissue].name for tissue in tissues]}
        wanted = make_provenance("cluster", source.settings(), inputs=inputs, **extra)
        if store.is_done(path, "clusters", wanted, overwrite=overwrite):
            return SKIPPED, ""
        scan = Scan.of(volume)
        lattice = lattice_shape(scan.mask.shape, source.cell)
        referred = _ReferredStatistics.of_scan(scan, source) if fitted.needs_statistics else None
        posterior, coverage = np.zeros((len(tissues), *lattice), np.float16), np.zeros(lattice, np.uint8)
        for part in source.parts(scan) if scan.mask.any() else ():
            if part.usable.any():
                tokens = np.ascontiguousarray(part.features[:, part.usable].T, dtype=np.float32)
                values = fitted.posterior(tokens, None if referred is None else referred.of(part))
                posterior[:, *part.sites][:, part.usable] = (_by_tissue(values, fitted) if joined else values).T
                coverage[part.sites][part.usable] = 1
        write_artefact(path, "clusters", {"posterior": posterior, "coverage": coverage}, provenance=wanted)
    return DONE, "" if coverage.any() else "no lung: nothing to cluster"


@dataclasses.dataclass(frozen=True)
class _ReferredStatistics:
    """HU statistics of all sites with lung of one scan, referred to that scan."""

    statistics: TokenStatistics
    row: np.ndarray
    """int32 (z, y, x): where a site's are; -1 without lung."""

    @classmethod
    def of_scan(cls, scan: Scan, source: TokenSource) -> _ReferredStatistics:
        """Those of a scan."""
        index, statistics, mode = source.statistics_of_lung(scan)
        row = np.full(lattice_shape(scan.mask.shape, source.cell), -1, dtype=np.int32)
        row[tuple(index.T)] = np.arange(len(index))
        return cls(refer_statistics(statistics, healthy_mode_hu=mode), row)

    def of(self, part: TokenPart) -> TokenStatistics:
        """Those of the usable tokens of a part, in their order."""
        rows = self.row[part.sites][part.usable]
        columns = {field.name: getattr(self.statistics, field.name) for field in dataclasses.fields(TokenStatistics)}
        return TokenStatistics(**{name: values[rows] for name, values in columns.items()})


def _by_tissue(values: np.ndarray, fitted: NamedFit) -> np.ndarray:
    """Posterior of the components (M, K) added up by tissue (M, 5)."""
    owner: list[Tissue] = [name.tissue for name in fitted.names]
    return values @ np.array([[tissue == mine for tissue in MIXTURE_TISSUES] for mine in owner], dtype=np.float32)
