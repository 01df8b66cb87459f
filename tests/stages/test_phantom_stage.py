"""``lungseg phantom``: three formats of the same truth, and a patch store that every stage takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_fixture import CLUSTER, EVALUATE, PHANTOM, QUIET, RADIOMICS, REFINE, TRAIN

from lungseg.config import PhantomConfig
from lungseg.config.fields import from_dict
from lungseg.errors import InputError, MismatchError, UsageError
from lungseg.scan.dicom import find_series, read_series
from lungseg.scan.nifti import read_image
from lungseg.stages.cluster import cluster
from lungseg.stages.evaluate import evaluate
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.stages.phantom import as_volume, phantom, phantom_spec
from lungseg.stages.preprocess import preprocess
from lungseg.stages.refine import refine
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.cases import Store
from lungseg.store.verify import verify_store

TESTS = Path(__file__).resolve().parents[1]
ONE = dataclasses.replace(PHANTOM, num=1, seed=41, kernel="sharp", slice_thickness_mm=4.0)
STORE = dataclasses.replace(ONE, format="store", store_spacing_mm=2.0, patch_size=(16, 16, 16), patch_stride=(8, 8, 8))


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dicom")
    phantom(folder, ONE, execution=QUIET).require_complete()
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store") / "cohort"
    phantom(folder, dataclasses.replace(STORE, num=2), execution=QUIET).require_complete()
    return Store(folder)


def test_header_says_kernel_and_slice_thickness(dicom: Path) -> None:
    (series,) = find_series(dicom / "phantom-41").series
    assert series.acquisition["kernel"] == "B70f"
    assert series.acquisition["slice_thickness_mm"] == pytest.approx(4.0)
    volume = read_series(series)
    assert volume.geometry.spacing_mm == pytest.approx(PHANTOM.spacing_mm)
    assert flat(volume.acquisition) == pytest.approx(flat(as_volume_facts(ONE)))


def as_volume_facts(config: PhantomConfig) -> dict[str, Any]:
    """Covariates that a phantom states of itself."""
    from lungseg.scan.phantom import make_phantom

    spec = phantom_spec(config, config.seed)
    return as_volume(make_phantom(spec, seed=config.seed), spec).acquisition


def test_nifti_holds_the_same_voxels(dicom: Path, tmp_path: Path) -> None:
    phantom(tmp_path, dataclasses.replace(ONE, format="nifti"), execution=QUIET).require_complete()
    image = read_image(tmp_path / "phantom-41.nii.gz")
    series = read_series(find_series(dicom / "phantom-41").series[0])
    np.testing.assert_array_equal(image.array, series.array)
    assert image.geometry.is_close(series.geometry)
    labels = read_image(tmp_path / "reference" / "phantom-41.nii.gz", integer=True)
    assert labels.geometry.is_close(image.geometry)
    manifest = (tmp_path / "manifest.csv").read_text(encoding="utf-8").splitlines()
    assert manifest[1] == "phantom-41.nii.gz,phantom-41,phantom-41,reference/phantom-41.nii.gz,inspiration"
    with pytest.raises(InputError, match="other settings"):
        phantom(tmp_path, ONE, execution=QUIET)


def test_store_is_what_preprocess_makes_of_the_series(dicom: Path, store: Store, tmp_path: Path) -> None:
    prepare = STORE.preprocessing("lungseg phantom")
    preprocess(None, tmp_path / "store", prepare, manifest=dicom / "manifest.csv", execution=QUIET).require_complete()
    other = Store(tmp_path / "store")
    name = "phantom-41"
    with store.open(name, "volume") as made, other.open(name, "volume") as read:
        for dataset in ("image", "mask", "patches/corner", "patches/mask_fraction", "source/image", "source/mask"):
            np.testing.assert_array_equal(made.read(dataset), read.read(dataset), err_msg=dataset)
        for fact in (
            "grid",
            "source",
            "patient_id",
            "inspiration",
            "split",
            "case_id",
            "lung_volume_ml",
            "acquisition",
        ):
            assert flat(made.provenance[fact]) == pytest.approx(flat(read.provenance[fact])), fact
        settings = made.provenance["config"]["phantom"]
        assert (settings["severity"], settings["kernel"]) == ("moderate", "sharp")
        assert made.provenance["seed"] == 41
    with store.open(name, "reference") as made, other.open(name, "reference") as read:
        np.testing.assert_array_equal(made.read("labels"), read.read("labels"))
        assert flat(made.provenance["grid"]) == pytest.approx(flat(read.provenance["grid"]))


def flat(value: Any) -> dict[str, Any]:
    """Numbers and words of nested JSON by path."""
    if isinstance(value, dict):
        return {f"{key}.{path}": v for key, inner in value.items() for path, v in flat(inner).items()}
    if isinstance(value, list):
        return {f"{i}.{path}": v for i, inner in enumerate(value) for path, v in flat(inner).items()}
    return {"": value}


def test_store_is_reproducible_kept_and_extended(store: Store, tmp_path: Path) -> None:
    again = phantom(tmp_path / "again", STORE, execution=QUIET)
    assert [o.status for o in again.outcomes] == ["done"]
    for file in ("volume.h5", "reference.h5"):
        name = Path("cases") / "phantom-41" / file
        assert (tmp_path / "again" / name).read_bytes() == (store.path / name).read_bytes()
    more = phantom(tmp_path / "again", dataclasses.replace(STORE, num=2), execution=QUIET)
    assert [o.status for o in more.outcomes] == ["complete already", "done"]
    with pytest.raises(MismatchError):  # another grid
        phantom(tmp_path / "again", dataclasses.replace(STORE, store_spacing_mm=3.0), execution=QUIET)
    refused = phantom(tmp_path / "again", dataclasses.replace(STORE, kernel="soft"), execution=QUIET)
    assert [o.status for o in refused.outcomes] == ["failed"]
    assert "other settings" in refused.outcomes[0].message


@pytest.mark.slow
def test_every_stage_takes_the_store(store: Store, tmp_path: Path) -> None:
    assert [finding for finding in verify_store(store) if finding.problem] == []
    extract_radiomics(store.path, RADIOMICS, execution=QUIET).require_complete()
    train_ddpm(store.path, tmp_path / "run", TRAIN, execution=QUIET)
    cluster(store.path, tmp_path / "run", CLUSTER, execution=QUIET).require_complete()
    refine(store.path, REFINE, execution=QUIET).require_complete()
    result = evaluate(store.path, tmp_path / "scores", EVALUATE, execution=QUIET)
    assert sorted(result.complete()) == ["phantom-41", "phantom-42"]
    assert (tmp_path / "scores" / "table.md").is_file()


def test_store_needs_no_reader_of_scans(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from gpu_node import BLOCKED, Missing\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from pathlib import Path\n"
        "from lungseg.config import Execution, PhantomConfig\n"
        "from lungseg.stages.phantom import phantom\n"
        "config = PhantomConfig(format='store', extent_mm=(100., 110., 130.), spacing_mm=(4., 3., 3.),\n"
        "                       store_spacing_mm=4.0, patch_size=(8, 8, 8), patch_stride=(8, 8, 8))\n"
        "phantom(Path(sys.argv[1]), config, execution=Execution(quiet=True)).require_complete()\n"
        "assert not {name.split('.')[0] for name in sys.modules} & set(BLOCKED)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store")],
        cwd=TESTS,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Store(tmp_path / "store").case_ids() == ["phantom-1000"]


def test_mixed_severity_follows_from_the_seed() -> None:
    config = PhantomConfig(severity="mixed", seed=8, num=4)
    assert [config.severity_of(seed) for seed in range(8, 12)] == ["healthy", "mild", "moderate", "severe"]
    assert phantom_spec(config, 8).diseases == ()
    assert phantom_spec(config, 11).diseases == config.diseases
    one = PhantomConfig(diseases=("ggo",), variants=("circle",), dose="low", slice_thickness_mm=3.0)
    spec = phantom_spec(one, 5)
    assert (spec.diseases, spec.variants, spec.dose, spec.thickness_mm) == (("ggo",), ("circle",), "low", 3.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kernel": "hard"}, "did you mean|not one of"),
        ({"dose": "none"}, "not one of"),
        ({"format": "png"}, "not one of"),
        ({"severity": "awful"}, "not one of"),
        ({"variants": "cavity,cavity"}, "--variants: each name once"),
        ({"variants": "flying"}, "not one of"),
        ({"diseases": ""}, "needs at least one"),
        ({"variants": "equal-hu", "diseases": "ggo"}, "equal-hu needs"),
        ({"variants": "large-consolidation", "severity": "mixed"}, "large-consolidation needs"),
        ({"slice_thickness_mm": 0.1}, "below the minimum"),
    ],
)
def test_impossible_options_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        from_dict(PhantomConfig, values)


def test_options_as_typed() -> None:
    config = from_dict(
        PhantomConfig, {"variants": "cavity,nodules", "diseases": "ggo", "slice-thickness-mm": "none", "num": "2"}
    )
    assert config.variants == ("cavity", "nodules")
    assert config.diseases == ("ggo",)
    assert config.slice_thickness_mm is None
