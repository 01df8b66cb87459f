"""Every method of clustering, from a store to label maps: deterministic, blind to labels, applied without refitting."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pipeline_fixture import QUIET, RADIOMICS, REFINE

from lungseg.config import ClusterConfig, Execution, make_config
from lungseg.config.cluster import METHODS, RADIOMICS_METHODS, STUDENT_METHODS, UNFITTED_METHODS, VOXEL_METHODS
from lungseg.config.run import RunConfig
from lungseg.errors import InputError, LungsegError, MismatchError, UsageError
from lungseg.segmentation.anchored import AnchoredFit
from lungseg.stages.cluster import cluster
from lungseg.stages.cluster_fit import block_scale
from lungseg.stages.cohort import StageResult
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.stages.fits import load_fit
from lungseg.stages.refine import refine
from lungseg.stages.run import plan_dict, plan_run, run
from lungseg.store.cases import Store
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.tissue import MIXTURE_TISSUES, TISSUES

CASE, OTHER = "phantom-11", "phantom-12"
SMALL: dict[str, Any] = {"restarts": 1, "tokens_per_case": 400, "timesteps": (0, 10)}


def settings(method: str) -> ClusterConfig:
    """The method as the preset `tiny` has it, with few components."""
    # a lung of a few centimetres holds two windows of 32 voxels
    few: dict[str, dict[str, Any]] = {
        "radiomics-kmeans": {"radiomics_window": 16, "token_stride": 8, "min_token_lung": 0.2},
        "hu-gmm": {},
    }
    return make_config(
        ClusterConfig, preset="tiny", method=method, **SMALL, **few.get(method, {"components": 8, "pca": 4})
    )


@dataclasses.dataclass(frozen=True)
class Single:
    """A store of one case that is clustered by nothing, and the training run of a model for it."""

    store: Path
    model: Path

    def copy(self, target: Path) -> Path:
        """A store to change."""
        return Path(shutil.copytree(self.store, target))


@pytest.fixture(scope="module")
def single(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Single:
    """One case of the finished run, with a standardisation of its own."""
    target = tmp_path_factory.mktemp("single") / "store"
    shutil.copytree(finished / "store", target, ignore=shutil.ignore_patterns("fits", "*.diffseglung.h5", OTHER))
    extract_radiomics(target, RADIOMICS, execution=Execution(quiet=True, overwrite=True)).require_complete()
    return Single(target, finished / "run")


def clustered(store: Path, run_dir: Path, config: ClusterConfig, *, fit: Path | None = None) -> StageResult:
    """What ``cluster`` says, which went well."""
    model = run_dir if config.method in STUDENT_METHODS else None
    return cluster(store, model, config, fit=fit, execution=QUIET).require_complete()


def results(store: Path, name: str) -> dict[str, bytes]:
    """Bytes of every file of a clustering, by path within the store."""
    files = [*store.glob(f"cases/*/*.{name}.h5"), *(store / "fits" / name).iterdir()]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


DEAR = ("diffusion-only", "diffseglung+radiomics", "diffusion-only+radiomics")
"""Methods whose path others take too, at more than ten seconds."""


@pytest.fixture(scope="module", params=[pytest.param(m, marks=pytest.mark.slow if m in DEAR else ()) for m in METHODS])
def mapped(
    request: pytest.FixtureRequest, single: Single, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Each method in turn, and a store it has mapped."""
    method = str(request.param)
    store = single.copy(tmp_path_factory.mktemp("mapped") / "store")
    return method, _mapped(store, single, method)


def _mapped(store: Path, single: Single, method: str) -> Path:
    config = settings(method)
    clustered(store, single.model, config)
    plain = dataclasses.replace(REFINE, name=config.run_name, fusion="none")
    refine(store, plain, execution=QUIET).require_complete()
    return store


def test_labels_are_the_same_without_references_and_with_noise_for_them(
    mapped: tuple[str, Path], single: Single, tmp_path: Path
) -> None:
    method, store = mapped
    name = settings(method).run_name
    found = results(store, name)
    for kind in ("none", "noise"):
        other = single.copy(tmp_path / kind)
        path = other / "cases" / CASE / "reference.h5"
        with h5py.File(path) as file:
            shape = file["labels"].shape
        path.unlink()
        if kind == "noise":
            noise = np.random.default_rng(3).integers(0, 6, shape, dtype=np.uint8)
            write_artefact(path, "reference", {"labels": noise}, provenance=make_provenance("preprocess", {}))
        assert results(_mapped(other, single, method), name) == found
    assert {path.split("/")[-1] for path in found} == {
        f"tokens.{name}.h5", f"clusters.{name}.h5", f"labels.{name}.h5", "mixture.safetensors", "clusters.json",
        "embedding.png",
    }  # fmt: skip


def test_posteriors_and_descriptions_say_what_they_are(mapped: tuple[str, Path]) -> None:
    method, store = mapped
    _check_description(store, method, settings(method).run_name)


def _check_description(store: Path, method: str, name: str) -> None:
    """clusters.json says what each component is and why; posteriors are posteriors, on the lattice they say."""
    description = json.loads((store / "fits" / name / "clusters.json").read_text())
    components = description["components"]
    assert description["kind"] == (
        "rules" if method in UNFITTED_METHODS else "kmeans" if method == "radiomics-kmeans" else "gmm"
    )
    assert [c["component"] for c in components] == list(range(len(components)))
    assert sum(c["weight"] for c in components) == pytest.approx(1.0, abs=1e-4)
    for component in components:
        assert component["rule"]
        assert component["tissue"] in {TISSUES[tissue].name for tissue in MIXTURE_TISSUES}
        assert component["weight"] == 0 or -1100 < component["median_hu"] < 400
    with Store(store).open(CASE, "clusters", name) as clusters, Store(store).open(CASE, "volume") as volume:
        posterior, coverage = clusters.read("posterior").astype(np.float32), clusters.read("coverage") > 0
        cell, mask = clusters.provenance["token_size"], volume.read("mask") > 0
        assert posterior.shape[0] == len(clusters.provenance["tissues"])
        assert posterior.shape[1:] == coverage.shape == tuple(-(-n // cell) for n in mask.shape)
        assert (cell == 1) == (method in VOXEL_METHODS)
        np.testing.assert_allclose(posterior[:, coverage].sum(0), 1.0, atol=5e-3)
        assert not posterior[:, ~coverage].any()
        assert coverage.sum() > 0.5 * mask.sum() / cell**3


def test_a_fit_is_applied_to_another_store_without_refitting(
    mapped: tuple[str, Path], single: Single, tmp_path: Path
) -> None:
    method, first = mapped
    config = settings(method)
    name = config.run_name
    # the other store has no standardisation of its own: the fit brings it
    second = single.copy(tmp_path / "second")
    (second / "standardisation.json").unlink()
    clustered(second, single.model, config, fit=first / "fits" / name)
    assert not (second / "fits").exists()
    file = f"cases/{CASE}/clusters.{name}.h5"
    assert (second / file).read_bytes() == (first / file).read_bytes()


@pytest.mark.parametrize("mixture", ["anchored", "kmeans", "vmf"])
def test_other_mixtures_of_the_same_tokens(mixture: str, single: Single, tmp_path: Path) -> None:
    """Fitted, saved, and applied again from the file; an anchored component is what it is anchored at."""
    store = single.copy(tmp_path / "store")
    method = "diffseglung" if mixture == "vmf" else "radiomics"
    config = dataclasses.replace(settings(method), mixture=mixture)  # 44 anchors need tokens 4 voxels apart
    clustered(store, single.model, config)
    file = store / "cases" / CASE / f"clusters.{method}.h5"
    before = file.read_bytes()
    file.unlink()
    clustered(store, single.model, config, fit=store / "fits" / method)
    assert file.read_bytes() == before
    fit = load_fit(store / "fits" / method)
    assert fit.mixture.kind == mixture
    if isinstance(fit.mixture, AnchoredFit):
        assert [name.tissue for name in fit.names] == list(fit.mixture.tissues)
        assert {name.rule for name in fit.names} == {"tissue by construction: anchored at its HU"}
    with Store(store).open(CASE, "clusters", method) as clusters:
        posterior, coverage = clusters.read("posterior").astype(np.float32), clusters.read("coverage") > 0
    np.testing.assert_allclose(posterior[:, coverage].sum(0), 1.0, atol=5e-3)


def test_combinations_weigh_both_blocks_alike() -> None:
    rng = np.random.default_rng(5)
    tokens = np.concatenate([rng.normal(0, 3, (2000, 40)), rng.normal(7, 0.1, (2000, 6)), np.ones((2000, 2))], axis=1)
    scale = block_scale(tokens, (40, 6, 2))
    variance = (tokens * scale).var(axis=0)
    assert variance[:40].sum() == pytest.approx(1.0, rel=1e-5)
    assert variance[40:46].sum() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_array_equal(scale[46:], 1.0)  # a block that does not vary


def test_methods_can_live_side_by_side_under_any_name(single: Single, tmp_path: Path) -> None:
    store = single.copy(tmp_path / "store")
    wide = make_config(ClusterConfig, method="rules", name="rules-wide", token_stride=4)
    clustered(store, single.model, wide)
    clustered(store, single.model, make_config(ClusterConfig, method="rules"))
    with Store(store).open(CASE, "clusters", "rules-wide") as coarse:
        assert coarse.provenance["token_size"] == 4
    with Store(store).open(CASE, "clusters", "rules") as fine:
        assert fine.provenance["token_size"] == 2


def test_errors_say_what_to_do(single: Single, tmp_path: Path) -> None:
    store = single.copy(tmp_path / "store")
    for method in STUDENT_METHODS:
        with pytest.raises(UsageError, match=r"needs a trained model.*--model"):
            cluster(store, None, settings(method), execution=QUIET)
    rules = settings("rules")
    with pytest.raises(UsageError, match=r"--bundle .* --method rules has no model: share the folder .*fits/rules"):
        cluster(store, None, rules, bundle=tmp_path / "b.safetensors", execution=QUIET)
    noted = cluster(store, single.model, rules, execution=QUIET)
    assert noted.notes[0] == "--model is not used: --method rules needs none"
    with pytest.raises(MismatchError, match="is of --method rules, not of hu-thresholds"):
        cluster(store, None, settings("hu-thresholds"), fit=store / "fits" / "rules", execution=QUIET)
    coarser = dataclasses.replace(rules, token_stride=8)
    with pytest.raises(MismatchError, match="token_stride: fitted with 2, now 8"):
        cluster(store, None, coarser, fit=store / "fits" / "rules", execution=QUIET)
    (store / "standardisation.json").unlink()
    with pytest.raises(InputError, match=r"standardisation.json is missing: run lungseg extract-radiomics"):
        cluster(store, None, settings("radiomics"), execution=QUIET)


def test_contradictions_are_usage_errors() -> None:
    for values, words in (
        ({"method": "hu-gmm", "token_stride": 4}, "leave --token-stride out"),
        ({"method": "radiomics-kmeans", "mixture": "gmm"}, "radiomics-kmeans means --mixture kmeans"),
        ({"method": "hu-gmm", "mixture": "kmeans"}, "hu-gmm means --mixture gmm"),
        ({"method": "radiomics", "mixture": "vmf"}, "vmf is for unit vectors"),
        ({"method": "radiomic"}, "did you mean 'radiomics'"),
    ):
        with pytest.raises(UsageError, match=words):
            make_config(ClusterConfig, **values)


def test_a_method_brings_its_recipe_and_options_beat_it() -> None:
    recipe = make_config(ClusterConfig, preset="tiny", method="radiomics-kmeans")
    assert (recipe.components, recipe.pca, recipe.naming, recipe.radiomics_window) == (5, 15, "mean-hu", 32)
    assert recipe.tokens_per_case == 4_000  # the preset's, which the recipe does not speak of
    assert make_config(ClusterConfig, method="radiomics-kmeans", components=9).components == 9
    assert make_config(ClusterConfig, file_values={"method": "hu-gmm", "pca": 1}).pca == 1
    assert {m for m in METHODS if m in STUDENT_METHODS and m in RADIOMICS_METHODS} == {
        "diffseglung+radiomics", "diffusion-only+radiomics",
    }  # fmt: skip


def test_thresholds_need_no_training_case(single: Single, tmp_path: Path) -> None:
    """A store of test scans alone can be mapped by what is not fitted; a mixture says what it lacks."""
    from tiny_store import add_case, make_store

    store = make_store(tmp_path / "store", cases=0)
    add_case(store, "case-0", split="test")
    with pytest.raises(InputError, match="no training case"):
        cluster(store, None, settings("hu-gmm"), execution=QUIET)
    for method in ("rules", "hu-thresholds"):
        assert cluster(store, None, settings(method), execution=QUIET).complete() == ["case-0"]


def test_what_fits_nothing_maps_the_next_scan_like_the_first(single: Single, tmp_path: Path) -> None:
    """A scan added to a folder is no reason to map the others anew; settings are."""
    store = single.copy(tmp_path / "store")
    later = store / "cases" / OTHER
    config = settings("rules")
    clustered(store, single.model, config)
    file = store / "cases" / CASE / "clusters.rules.h5"
    before = file.stat().st_mtime_ns
    shutil.copytree(store / "cases" / CASE, later, ignore=shutil.ignore_patterns("*.rules.h5"))
    assert cluster(store, None, config, execution=QUIET).complete() == [CASE, OTHER]
    assert file.stat().st_mtime_ns == before
    assert (later / "clusters.rules.h5").exists()
    described = json.loads((store / "fits" / "rules" / "clusters.json").read_text())["provenance"]
    assert {CASE, OTHER} <= described["inputs"].keys()
    with pytest.raises(LungsegError, match="naming_window: there"):
        cluster(store, None, dataclasses.replace(config, naming_window=4), execution=QUIET)


@pytest.mark.slow
def test_run_needs_no_model_where_the_method_needs_none(manifest: Path, tmp_path: Path) -> None:
    toml = tmp_path / "rules.toml"
    # nothing said: the rules; a method that needs a model takes the shipped one
    plan = plan_run(RunConfig())
    assert (plan.cluster.method, plan.refine.name, plan.preprocess.spacing_mm) == ("rules", "rules", 1.0)
    assert plan_run(RunConfig(preset="lungseg")).preprocess.spacing_mm == 0.6  # said, so taken
    assert plan_run(RunConfig(), train=True).preprocess.spacing_mm == 0.6
    toml.write_text('[cluster]\nmethod = "diffseglung"\n')
    assert plan_dict(RunConfig(config=str(toml)))["preprocess"]["spacing_mm"] == 1.0
    toml.write_text('[preprocess]\nspacing-mm = 2.0\n[cluster]\nmethod = "rules"\n')
    rules = RunConfig(preset="tiny", config=str(toml))
    with pytest.raises(UsageError, match="--train trains a model, which method rules"):
        run(None, tmp_path / "out", rules, manifest=manifest, train=True, execution=QUIET)
    done = run(
        None, tmp_path / "out", RunConfig(preset="tiny", config=str(toml), salt="s"), manifest=manifest,
        execution=Execution(quiet=True),
    )  # fmt: skip
    assert done.exit_code == 0
    assert len(list((tmp_path / "out" / "results").glob("*.nii.gz"))) == 2
