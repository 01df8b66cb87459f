"""The fit of ``lungseg cluster``: a bounded sample of tokens of each case, one clustering of them, and its names."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lungseg.config.cluster import UNFITTED_METHODS, ClusterConfig
from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.errors import MismatchError
from lungseg.segmentation.anchored import AnchoredFit, fit_anchored
from lungseg.segmentation.baselines import fit_kmeans
from lungseg.segmentation.clustering import Clustering, TissueVotes
from lungseg.segmentation.density import TokenStatistics
from lungseg.segmentation.hu_anchors import refer_statistics
from lungseg.segmentation.mixture import fit_mixture
from lungseg.segmentation.naming import ComponentName, NamingRule, name_components, renumbered
from lungseg.segmentation.spherical import fit_spherical
from lungseg.stages.cohort import DONE, SKIPPED, limited_threads
from lungseg.stages.fits import NamedFit, load_fit, write_fit
from lungseg.stages.pictures import embedding_picture
from lungseg.stages.token_sources import Scan, TokenSource
from lungseg.store.atomic import read_json
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.schema import check_current, make_provenance, write_artefact
from lungseg.tissue import MIXTURE_TISSUES, UNCLASSIFIED, Tissue

log = logging.getLogger(__name__)

FIT_SETTINGS = tuple(
    f.name for f in dataclasses.fields(ClusterConfig) if f.name not in ("name", "batch_size", "slab_gib")
)
"""Settings that a fit depends on."""
RULES: Mapping[str, str] = {
    "rules": "tissue by the naming rules of each token",
    "attention": "tissue by the votes of each attention segment",
    "hu-thresholds": "tissue by HU thresholds",
}
"""Why a component of a method without a fit has its tissue."""
ANCHORED_RULE = "tissue by construction: anchored at its HU"
_STATISTICS = tuple(field.name for field in dataclasses.fields(TokenStatistics))


def sample_case(case_id: str, store: Store, source: TokenSource, overwrite: bool) -> tuple[str, str]:
    """Write ``tokens.<name>.h5``: a bounded random sample of one case's tokens with their HU statistics."""
    config, name = source.config, source.config.run_name
    path = store.case_file(case_id, "tokens", name)
    with lock(store.lock_file(case_id, f"tokens.{name}")), store.open(case_id, "volume") as volume:
        settings = {**source.settings(naming=True), "tokens_per_case": config.tokens_per_case}
        inputs = {"volume.h5": volume.fingerprint, **source.inputs}
        wanted = make_provenance("cluster", settings, inputs=inputs, statistics=list(_STATISTICS))
        if store.is_done(path, "tokens", wanted, overwrite=overwrite):
            return SKIPPED, ""
        scan = Scan.of(volume)
        index, features = _draw(scan, source, _seed_of(config.seed, case_id))
        statistics, mode = source.statistics(scan, index)
        datasets = {
            "index": index,
            "features": features,
            "shares": source.rule_shares(scan, index),
            "statistics": np.stack([getattr(statistics, name) for name in _STATISTICS], axis=1).astype(np.float32),
        }
        write_artefact(path, "tokens", datasets, provenance={**wanted, "healthy_mode_hu": mode})
    return DONE, "" if len(index) else "no token with enough lung"


def _draw(scan: Scan, source: TokenSource, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sites int32 (n, 3) and features float32 (n, C) of tokens with enough lung, drawn at random."""
    share = source.lung_share(scan.mask)
    candidates = np.flatnonzero(share >= max(source.config.min_token_lung, 1e-9))
    rng = np.random.Generator(np.random.Philox(seed))
    # in random order: the fit takes the first ones of each case when there are too many
    chosen = rng.permutation(candidates)[: source.config.tokens_per_case]
    place = np.full(share.shape, -1, dtype=np.int32)
    place.reshape(-1)[chosen] = np.arange(len(chosen))
    features, found = np.zeros((0, 0), dtype=np.float32), np.zeros(len(chosen), dtype=bool)
    for part in source.parts(scan):
        wanted = place[part.sites]
        taken = (wanted >= 0) & part.usable
        if not found.any():
            features = np.zeros((len(chosen), part.features.shape[0]), dtype=np.float32)
        features[wanted[taken]] = part.features[:, taken].T
        found[wanted[taken]] = True
    index = np.stack(np.unravel_index(chosen, share.shape), axis=1).astype(np.int32)
    return index[found], features[found]


def _seed_of(seed: int, case_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{case_id}".encode()).digest()[:8], "little")


def fit_cohort(store: Store, case_ids: list[str], source: TokenSource, execution: Execution) -> NamedFit:
    """Fit and name the clustering of the cases' samples, or load the one made before of the same ones.

    Raises
    ------
    MismatchError
        If a fit of other settings or tokens is there and ``execution.overwrite`` is off. Of a method that fits nothing
        other scans are no reason: the next scan of a folder is mapped like the first ones.
    """
    config, name = source.config, source.config.run_name
    folder = store.fit_dir(name)
    with lock(store.path / f"fits.{name}.lock"), limited_threads(execution.threads):
        samples = {}
        for case_id in case_ids:
            with store.open(case_id, "tokens", name) as artefact:
                samples[case_id] = artefact.fingerprint
        settings = {key: value for key, value in to_dict(config).items() if key in FIT_SETTINGS}
        settings.update(source.settings(naming=True))
        facts: dict[str, Any] = {"spacing_mm": store.header["config"].get("spacing_mm")}
        if source.standardisation is not None:
            facts["standardisation"] = source.standardisation.to_dict()
        wanted = make_provenance("cluster", settings, inputs={**samples, **source.inputs}, **facts)
        if (folder / "clusters.json").exists():
            try:
                check_current(read_json(folder / "clusters.json")["provenance"], wanted, what=str(folder))
                return load_fit(folder)
            except MismatchError:
                # Where nothing is fitted the sample only describes: with other scans it is described again, and what
                # was mapped before stays as it is.
                if not (
                    execution.overwrite or (config.method in UNFITTED_METHODS and _differs_in_cases(folder, wanted))
                ):
                    raise
        sample = _read(store, case_ids, config)
        fitted = _fit(sample, source, wanted)
        write_fit(folder, fitted, _pictures(sample, fitted))
    return fitted


def _differs_in_cases(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a fit was made with the same settings and model, of other scans."""
    there = read_json(folder / "clusters.json")["provenance"]
    kept = {key: wanted["inputs"].get(key) for key in ("model", "standardisation")}
    try:
        check_current(
            {**there, "inputs": {key: there["inputs"].get(key) for key in kept}}, {**wanted, "inputs": kept}, what=""
        )
    except MismatchError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Tokens of the cohort, equally many a case, and what is known of each."""

    tokens: np.ndarray
    """float32 (N, C)."""
    statistics: TokenStatistics
    names: np.ndarray
    """uint8 (N,): tissue by the naming rules."""
    referred: TokenStatistics
    """The statistics, each token's referred to its own scan."""


def _read(store: Store, case_ids: list[str], config: ClusterConfig) -> _Sample:
    share = max(1, config.max_tokens // len(case_ids))
    tokens, statistics, names, referred = [], [], [], []
    tissues = np.array(MIXTURE_TISSUES, dtype=np.uint8)
    for case_id in case_ids:
        with store.open(case_id, "tokens", config.run_name) as sample:
            if not len(found := sample.read("features")[:share]):
                continue
            table = _statistics(sample.read("statistics")[:share])
            shares, mode = sample.read("shares")[:share], sample.provenance["healthy_mode_hu"]
        tokens.append(found)
        statistics.append(table)
        names.append(np.where(shares.any(axis=1), tissues[shares.argmax(axis=1)], np.uint8(UNCLASSIFIED)))
        referred.append(refer_statistics(table, healthy_mode_hu=mode))
    if not tokens:
        raise MismatchError(f"no case of {store.path} has a token with enough lung: lower --min-token-lung")
    return _Sample(np.concatenate(tokens), _join(statistics), np.concatenate(names), _join(referred))


def _fit(sample: _Sample, source: TokenSource, provenance: dict[str, Any]) -> NamedFit:
    """Clustering over equally many tokens a case, named by what its members look like."""
    config = source.config
    scale = None
    if blocks := source.block_channels:
        scale = block_scale(sample.tokens, blocks)
        sample = dataclasses.replace(sample, tokens=sample.tokens * scale)
    clustering = _fit_clustering(sample, source)
    rule = cast(NamingRule, config.naming)
    posterior = clustering.posterior(sample.tokens, sample.referred)
    names = name_components(posterior, sample.names, sample.statistics, rule=rule)
    if isinstance(clustering, TissueVotes):
        names = _named_by_construction(sorted(names, key=_component), clustering.tissues, RULES[config.method])
    else:
        clustering = clustering.reorder([name.component for name in names])
        if isinstance(clustering, AnchoredFit):
            names = _named_by_construction(names, clustering.tissues, ANCHORED_RULE)
    return NamedFit(clustering, tuple(renumbered(names)), provenance, scale)


def _pictures(sample: _Sample, fitted: NamedFit) -> dict[str, bytes]:
    """The map of what was clustered, by file name."""
    tokens = sample.tokens if fitted.token_scale is None else sample.tokens * fitted.token_scale
    posterior = fitted.posterior(sample.tokens, sample.referred)
    return embedding_picture(tokens, posterior, sample.statistics.median_hu, [name.tissue for name in fitted.names])


def block_scale(tokens: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Factor float32 (C,) of each channel that gives each block of channels a total variance of 1.

    Parameters
    ----------
    tokens : float array, shape (N, C)
    blocks : ints
        Channels of each block, side by side; their sum is C. A block that does not vary keeps its scale.
    """
    scale = np.ones(tokens.shape[1], dtype=np.float32)
    start = 0
    for channels in blocks:
        block = slice(start, start + channels)
        total = float(tokens[:, block].var(axis=0, dtype=np.float64).sum())
        scale[block] = 1.0 / np.sqrt(total) if total > 0 else 1.0
        start += channels
    return scale


def _fit_clustering(sample: _Sample, source: TokenSource) -> Clustering:
    config = source.config
    if config.method in UNFITTED_METHODS:
        return TissueVotes()
    log.info("cluster: fitting %s to %d tokens", config.mixture, len(sample.tokens))
    reduction: dict[str, Any] = {"pca_components": config.pca, "whiten": config.whiten}
    search: dict[str, Any] = {
        "restarts": config.restarts, "max_iterations": config.iterations, "seed": config.seed,
    }  # fmt: skip
    if config.mixture == "kmeans":
        return fit_kmeans(
            sample.tokens, num_components=config.components, standardise=config.standardise, **reduction, **search
        )
    if config.mixture == "vmf":
        levels = len(config.timesteps) if config.combine == "concat" else 1
        return fit_spherical(sample.tokens, num_components=config.components, blocks=levels, **search)
    if config.mixture == "anchored":
        anchored = fit_anchored(
            sample.tokens, sample.referred, standardise=config.standardise, regularisation=config.regularisation,
            max_iterations=config.iterations, **reduction,
        )  # fmt: skip
        log.info("cluster: %d components have members, converged %s", anchored.num_components, anchored.converged)
        return anchored
    mixture = fit_mixture(
        sample.tokens, num_components=config.components, standardise=config.standardise,
        regularisation=config.regularisation, **reduction, **search,
    )  # fmt: skip
    log.info("cluster: effective rank %.1f, converged %s", mixture.effective_rank, mixture.converged)
    return mixture


def _component(name: ComponentName) -> int:
    return name.component


def _named_by_construction(names: Sequence[ComponentName], tissues: Sequence[Tissue], rule: str) -> list[ComponentName]:
    """Names whose tissue the clustering gives itself: that of the component in the same place."""
    return [dataclasses.replace(name, tissue=tissue, rule=rule) for name, tissue in zip(names, tissues, strict=True)]


def _statistics(table: np.ndarray) -> TokenStatistics:
    columns = {name: table[:, i] for i, name in enumerate(_STATISTICS)}
    columns["num_voxels"] = columns["num_voxels"].astype(np.int32)
    return TokenStatistics(**columns)


def _join(parts: list[TokenStatistics]) -> TokenStatistics:
    return TokenStatistics(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _STATISTICS})
