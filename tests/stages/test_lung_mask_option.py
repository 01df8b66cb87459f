"""`--lung-mask` of preprocess and run: which mask belongs to which scan, what is written of it, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lungmask_package import install
from scan_fixture import CONFIG, GRID, QUIET, chest, dicom, image, quick
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.config import Execution
from lungseg.config.preprocess import PreprocessConfig
from lungseg.config.presets import make_config
from lungseg.config.run import RunConfig
from lungseg.errors import InputError, MismatchError, ResourceError, UsageError
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry
from lungseg.stages.cohort import StageResult
from lungseg.stages.preprocess import preprocess
from lungseg.stages.run import run
from lungseg.stages.scan_check import check_scans
from lungseg.store.cases import Store, read_id_map
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

pytestmark = pytest.mark.usefixtures(quick.__name__)
OVERWRITE = Execution(quiet=True, overwrite=True)
NAME = "Zebrafink-Anna"
SIZES = ("--spacing", 6, "--patch-size", "8,8,8", "--patch-stride", "8,8,8", "--salt", "test")


def sides(seed: int = 0) -> np.ndarray:
    """The lungs of the chest: 1 left, 2 right."""
    lung = chest(seed) < -500
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID.shape[1:]], indexing="ij")
    lung &= np.hypot(y, x) < 0.85
    return np.where(lung, np.where(x > 0, LUNG_LEFT, LUNG_RIGHT), 0).astype(np.uint8)


RIGHT_LEFT = np.array([0, 2, 1], np.uint8)
"""From our labels to those of lungmask."""


def config(**values: Any) -> PreprocessConfig:
    return make_config(
        PreprocessConfig, spacing_mm=6.0, patch_size=(8, 8, 8), patch_stride=(8, 8, 8), salt="test", **values
    )


def made(
    scans: Path | Sequence[Path], mask: Path | str | None, store: Path, execution: Execution = QUIET, **values: Any
) -> StageResult:
    return preprocess(scans, store, config(**values), lung_mask=mask, execution=execution)


def provenance(store: Path, case_id: str) -> dict[str, Any]:
    with Store(store).open(case_id, "volume") as volume:
        return volume.provenance


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return image(tmp_path / "scans" / "scan.nii.gz", chest())


def test_a_mask_takes_the_place_of_our_lungs(scan: Path, tmp_path: Path) -> None:
    mask = image(tmp_path / "mask.nii.gz", RIGHT_LEFT[np.where(sides() > 0, sides(), 0)])
    result = made(scan, mask, tmp_path / "store")
    (outcome,) = result.outcomes
    assert outcome.status == "done"
    assert result.notes[0] == "lungs from masks, scans by convention of the labels: lungmask 1"
    found = provenance(tmp_path / "store", outcome.case_id)
    assert found["lungs"] == {
        "method": "mask", "convention": "lungmask", "lung_mask": found["inputs"]["lung_mask"],
        "mean_hu": pytest.approx(-850, abs=2),
    }  # fmt: skip
    assert found["lung_volume_ml"] == pytest.approx(np.count_nonzero(sides()) * 0.2)
    with Store(tmp_path / "store").open(outcome.case_id, "volume") as volume:
        start = found["source"]["crop_start"]
        stored = volume.read("source/mask")
        box = tuple(slice(a, a + n) for a, n in zip(start, stored.shape, strict=True))
        assert np.array_equal(stored, sides()[box])
        assert np.count_nonzero(stored) == np.count_nonzero(sides())


def test_without_a_mask_nothing_changes_but_the_origin_of_the_lungs(scan: Path, tmp_path: Path) -> None:
    (outcome,) = made(scan, None, tmp_path / "store").outcomes
    found = provenance(tmp_path / "store", outcome.case_id)
    assert found["lungs"]["method"] == "lungseg"
    assert set(found["inputs"]) == {"scan"}
    assert "lungs" not in found["config"]
    assert "lung_mask_labels" not in Store(tmp_path / "store").header["config"]


def test_a_changed_mask_is_noticed_and_replaced_on_request(scan: Path, tmp_path: Path) -> None:
    store, mask = tmp_path / "store", tmp_path / "mask.nii.gz"
    image(mask, sides())
    assert made(scan, mask, store).outcomes[0].status == "done"
    assert made(scan, mask, store).outcomes[0].status == "complete already"
    write_image(mask, sides(), GRID, stored_axes=(1, 2, 0))  # another layout of the same mask
    assert made(scan, mask, store).outcomes[0].status == "complete already"
    smaller = sides()
    smaller[:, :, 10:12] = 0
    image(mask, smaller)
    (changed,) = made(scan, mask, store).outcomes
    assert changed.exit_code == MismatchError.exit_code
    assert "input lung_mask: there " in changed.message
    (own,) = made(scan, None, store).outcomes
    assert own.exit_code == MismatchError.exit_code
    assert "config lungs: there mask, now None" in own.message
    (read,) = made(scan, mask, store, lung_mask_labels="binary").outcomes
    assert "config lung_mask_labels: there auto, now binary" in read.message
    assert made(scan, mask, store, OVERWRITE).outcomes[0].status == "done"
    assert made(scan, mask, store).outcomes[0].status == "complete already"


def test_masks_of_a_folder_belong_by_case_id_or_name(tmp_path: Path) -> None:
    """Image files by their name, DICOM by its folder, any scan by its case id, which goes first."""
    root, masks = tmp_path / "scans", tmp_path / "masks"
    one, two = image(root / "one.nii.gz", chest(1)), image(root / "two.nii.gz", chest(2))
    three = dicom(root / "three", patient="p3", series="3")
    ids = tmp_path / "ids.csv"
    preprocess([one, two, three], tmp_path / "first", CONFIG, id_map=ids, execution=QUIET)
    case_of = {Path(row["source"]).name: row["case_id"] for row in read_id_map(ids)}
    image(masks / "one.nii.gz", sides())
    image(masks / f"{case_of['two.nii.gz']}.nii.gz", RIGHT_LEFT[sides()])
    image(masks / "three.nii.gz", (sides() > 0).astype(np.uint8))
    result = made([one, two, three], masks, tmp_path / "store")
    assert [outcome.status for outcome in result.outcomes] == ["done"] * 3
    conventions = {
        name: provenance(tmp_path / "store", case_id)["lungs"]["convention"] for name, case_id in case_of.items()
    }
    assert conventions == {"one.nii.gz": "lungseg", "two.nii.gz": "lungmask", "three": "binary"}


def test_a_scan_without_its_mask_fails_and_the_others_go_on(tmp_path: Path) -> None:
    root, masks = tmp_path / "scans", tmp_path / "masks"
    image(root / "one.nii.gz", chest(1))
    image(root / "two.nii.gz", chest(2))
    dicom(root / "three", patient="p3", series="3")
    image(masks / "one.nii.gz", sides())
    result = made(root, masks, tmp_path / "store")
    assert result.exit_code == 8
    failed = [outcome for outcome in result.outcomes if outcome.status == "failed"]
    assert len(failed) == 2
    for outcome in failed:
        assert outcome.exit_code == InputError.exit_code
        assert outcome.message.startswith("no lung mask for this scan: the folder of --lung-mask holds neither ")
        assert "lungs of another origin are not mixed in" in outcome.message
    assert len(Store(tmp_path / "store").case_ids()) == 1
    result = check_scans([root], None, CONFIG, lung_mask=masks, execution=QUIET)
    assert result.exit_code == 8
    assert sorted(row.verdict for row in result.values["rows"]) == ["ok", "refused", "refused"]


def test_two_scans_of_one_name_need_masks_by_case_id(tmp_path: Path) -> None:
    scans = [image(tmp_path / part / "scan.nii.gz", chest(k)) for k, part in enumerate(("a", "b"))]
    masks = tmp_path / "masks"
    image(masks / "scan.nii.gz", sides())
    result = made(scans, masks, tmp_path / "store")
    assert [outcome.status for outcome in result.outcomes] == ["failed", "failed"]


def test_masks_below_the_scans_are_no_scans(tmp_path: Path) -> None:
    root = tmp_path / "data"
    image(root / "one.nii.gz", chest(1))
    image(root / "lungs" / "one.nii.gz", sides())
    result = made(root, root / "lungs", tmp_path / "store")
    assert [outcome.status for outcome in result.outcomes] == ["done"]
    mask = image(root / "only.nii.gz", sides())
    (tmp_path / "data" / "lungs" / "one.nii.gz").unlink()
    assert [outcome.status for outcome in made(root, mask, tmp_path / "other").outcomes] == ["done"]


def test_a_manifest_names_scans_and_masks_by_case_id(tmp_path: Path) -> None:
    """Scans and masks may share a folder there: nothing is searched."""
    image(tmp_path / "all" / "x1.nii.gz", chest(1))
    image(tmp_path / "all" / "a.nii.gz", sides())
    (tmp_path / "cases.csv").write_text("path,case_id\nall/x1.nii.gz,a\n", encoding="utf-8")
    result = preprocess(
        None, tmp_path / "store", CONFIG, manifest=tmp_path / "cases.csv", lung_mask=tmp_path / "all", execution=QUIET
    )
    assert [outcome.status for outcome in result.outcomes] == ["done"]
    assert provenance(tmp_path / "store", "a")["lungs"]["convention"] == "lungseg"


def test_what_cannot_be_meant_is_refused_before_anything_is_written(scan: Path, tmp_path: Path) -> None:
    store, empty = tmp_path / "store", tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "mask.txt").write_text("no mask", encoding="utf-8")
    twice = tmp_path / "twice"
    image(twice / "scan.nii.gz", sides())
    image(twice / "scan.nii.gz", sides()).rename(twice / "scan.nii.gz.nii.gz")
    image(twice / "b.nii.gz", sides())
    (twice / "b.mha").write_bytes(b"")
    for mask, said in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "mask.txt", "unknown format"),
        (empty, "holds no mask"),
        (scan.parent, "lie in one folder"),
        (twice, "several files are called b"),
    ):
        with pytest.raises(InputError, match=said):
            made(scan, mask, store)
        with pytest.raises(InputError, match=said):
            check_scans([scan], None, CONFIG, lung_mask=mask, execution=QUIET)
    other = image(tmp_path / "scans" / "other.nii.gz", chest(1))
    mask = image(tmp_path / "mask.nii.gz", sides())
    with pytest.raises(InputError, match="mask of one scan, but 2 scans were found"):
        check_scans([scan, other], None, CONFIG, lung_mask=mask, execution=QUIET)
    with pytest.raises(InputError, match="nothing but the masks"):
        made(mask, mask, store)
    with pytest.raises(UsageError, match="--lung-mask-labels"):
        made(scan, None, store, lung_mask_labels="cip")
    assert not store.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("empty", "the lung mask is empty"),
        ("swapped", "patient's right"),
        ("foreign", "9 ("),
        ("tissue", "holds no lung of this scan"),
        ("grid", "--resample-masks"),
        ("rubbish", "the lung mask"),
    ],
)
def test_a_mask_that_does_not_fit_fails_its_case(scan: Path, tmp_path: Path, change: str, said: str) -> None:
    mask, folder = sides(), tmp_path / NAME
    values = {"lung_mask_labels": "lungmask"} if change == "swapped" else {}
    path = image(folder / f"{NAME}.nii.gz", mask)
    if change == "empty":
        image(path, np.zeros_like(mask))
    elif change == "foreign":
        mask[0, 0, 0] = 9
        image(path, mask)
    elif change == "tissue":
        image(path, (np.abs(chest() - 40) < 40).astype(np.uint8))
    elif change == "grid":
        write_image(path, mask, Geometry(GRID.shape, (8.0, 5.0, 5.5)))
    elif change == "rubbish":
        path.write_bytes(b"no image")
    (outcome,) = made(scan, path, tmp_path / "store", **values).outcomes
    assert outcome.exit_code == InputError.exit_code
    assert said in outcome.message
    assert NAME not in outcome.message
    assert not list((tmp_path / "store").rglob("*.h5"))
    (row,) = check_scans([scan], None, config(**values), lung_mask=path, execution=QUIET).values["rows"]
    assert row.verdict == "refused"
    assert row.message == outcome.message
    if change == "grid":
        allowed = made(scan, path, tmp_path / "store", resample_masks=True)
        assert allowed.outcomes[0].status == "done"


def test_warnings_of_a_mask_are_those_of_the_case(scan: Path, tmp_path: Path) -> None:
    """A moved mask passes with a warning that stands in the store and in the verdict."""
    mask = image(tmp_path / "mask.nii.gz", np.roll(sides(), 3, axis=2))
    (outcome,) = made(scan, mask, tmp_path / "store").outcomes
    assert outcome.status == "done"
    assert "lung beside the mask" in outcome.message
    assert any("lung beside" in text for text in provenance(tmp_path / "store", outcome.case_id)["warnings"])
    (row,) = check_scans([scan], None, CONFIG, lung_mask=mask, execution=QUIET).values["rows"]
    assert (row.verdict, row.lung_labels) == ("ok with warnings", "lungseg")


def test_a_cut_lung_of_a_mask_has_the_usual_status(tmp_path: Path) -> None:
    array = chest(top=0.1)
    scan = image(tmp_path / "scans" / "cut.nii.gz", array)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID.shape[1:]], indexing="ij")
    mask = image(tmp_path / "mask.nii.gz", ((array < -500) & (np.hypot(y, x) < 0.85)).astype(np.uint8))
    (outcome,) = made(scan, mask, tmp_path / "store").outcomes
    assert outcome.flags == ("truncated",)


def test_the_command_line_knows_it(scan: Path, tmp_path: Path) -> None:
    folder = tmp_path / NAME
    mask = image(folder / f"{NAME}.nii.gz", RIGHT_LEFT[sides()])

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    plan = json.loads(call("preprocess", scan, "-o", "x", "--lung-mask", mask, "--dry-run").stdout)
    assert plan["paths"]["lung_mask"] == str(mask)
    checked = call("preprocess", scan, "--check", "--json", "--lung-mask", mask, *SIZES)
    assert checked.exit_code == 0, checked.output
    (case,) = json.loads(checked.stdout)["cases"]
    assert (case["lung_labels"], case["verdict"]) == ("lungmask", "ok")
    table = call("preprocess", scan, "--check", "--lung-mask", mask, *SIZES)
    assert "mask: lungmask" in " ".join(table.stdout.split())
    assert max(map(len, table.stdout.splitlines())) <= 120
    done = call("preprocess", scan, "-o", tmp_path / "store", "--lung-mask", mask, *SIZES)
    assert done.exit_code == 0, done.output
    assert "lungmask 1" in done.stdout
    for result in (checked, table, done):
        assert NAME not in result.output
    for path in (tmp_path / "store").rglob("*"):
        assert not path.is_file() or NAME.encode() not in path.read_bytes()
    listed = call("preprocess", scan, "--list", "--lung-mask", mask)
    assert listed.exit_code == 2
    assert "--lung-mask goes with a real run or --check" in listed.output
    wrong = call("preprocess", scan, "--check", "--lung-mask", mask, "--lung-mask-labels", "cipp")
    assert wrong.exit_code == 2
    assert "did you mean 'cip'?" in wrong.output


def test_the_network_of_lungmask(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch)
    (outcome,) = made(scan, "lungmask", tmp_path / "store").outcomes
    assert outcome.status == "done"
    found = provenance(tmp_path / "store", outcome.case_id)
    identity = found["inputs"]["lungmask"]
    assert identity.startswith("0.2.22 R231 ")
    assert found["lungs"]["method"] == found["lungs"]["convention"] == "lungmask"
    assert found["lungs"]["lungmask"] == identity
    with Store(tmp_path / "store").open(outcome.case_id, "volume") as volume:
        assert np.count_nonzero(volume.read("source/mask") == LUNG_LEFT) == np.count_nonzero(sides() == LUNG_LEFT)
    assert made(scan, "lungmask", tmp_path / "store").outcomes[0].status == "complete already"
    (tmp_path / "site" / "hub" / "checkpoints" / "unet_r231-d5d2fc3d.pth").write_bytes(b"weights, others")
    (other,) = made(scan, "lungmask", tmp_path / "store").outcomes
    assert other.exit_code == MismatchError.exit_code
    assert "input lungmask: there 0.2.22 R231" in other.message


def test_without_the_package_nothing_is_written(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lungmask", None)
    with pytest.raises(ResourceError, match="pip install"):
        made(scan, "lungmask", tmp_path / "store")
    with pytest.raises(ResourceError, match="pip install"):
        check_scans([scan], None, CONFIG, lung_mask="lungmask", execution=QUIET)
    assert not (tmp_path / "store").exists()


def test_run_hands_it_on(scan: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--lung-mask .*no such file or folder"):
        run(scan, tmp_path / "out", train=True, lung_mask=tmp_path / "nowhere", execution=QUIET)
    with pytest.raises(UsageError, match="--lung-mask-labels"):
        run(scan, tmp_path / "out", RunConfig(lung_mask_labels="cip"), train=True, execution=QUIET)
