"""``lungseg cluster`` in slabs, and fits made before there were any."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pipeline_fixture import CLUSTER, QUIET

from lungseg.diffusion.checkpoint import load_student, read_model_file, save_model
from lungseg.errors import MismatchError
from lungseg.stages.cluster import cluster
from lungseg.stages.cohort import SKIPPED
from lungseg.stages.fits import load_fit
from lungseg.stages.run import _dictated
from lungseg.store.cases import Store


def test_auto_is_slabs_for_a_local_model_and_a_rerun_finds_its_work(copy: Path) -> None:
    config = dataclasses.replace(CLUSTER, name="whole", encoding="auto")
    cluster(copy / "store", copy / "run", config, execution=QUIET).require_complete()
    store = Store(copy / "store")
    case_id = store.case_ids()[0]
    with (
        store.open(case_id, "clusters", "whole") as slabs,
        store.open(case_id, "clusters", CLUSTER.run_name) as windows,
    ):
        assert slabs.provenance["config"]["encoding"] == "slabs"
        assert windows.provenance["config"]["encoding"] == "windows"
        assert slabs.shape("posterior") == windows.shape("posterior")
        covered = slabs.read("coverage") > 0
        assert (covered >= (windows.read("coverage") > 0)).all()
        total = slabs.read("posterior").astype(float).sum(0)
    assert abs(total[covered] - 1).max() < 0.01
    again = cluster(
        copy / "store", copy / "run", dataclasses.replace(config, encoding="slabs", slab_gib=0.001), execution=QUIET
    )
    assert {outcome.status for outcome in again.outcomes} == {SKIPPED}


def test_a_fit_from_before_slabs_means_windows(copy: Path) -> None:
    bundle = copy / "bundle.safetensors"
    metadata, tensors = read_model_file(bundle)
    extra = metadata["extra"]
    del extra["provenance"]["config"]["encoding"]
    student = load_student(bundle)
    fit = {name: t for name, t in tensors.items() if name.startswith("fit.")}
    weights = {name: t for name, t in tensors.items() if not name.startswith("fit.")}
    save_model(bundle, weights, config=student.config, card=student.card, extra_tensors=fit, extra=extra)
    assert "encoding" not in load_fit(bundle).provenance["config"]
    dictated = next(values for cls, values in _dictated(bundle).items() if cls is type(CLUSTER))
    assert dictated["encoding"] == "windows"
    new = dataclasses.replace(CLUSTER, name="new")
    cluster(copy / "store", bundle, new, fit=bundle, execution=QUIET).require_complete()
    with pytest.raises(MismatchError, match="encoding: fitted with windows, now slabs"):
        cluster(copy / "store", bundle, dataclasses.replace(new, encoding="auto"), fit=bundle, execution=QUIET)
