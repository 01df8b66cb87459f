"""Files beside label maps that `refine --export` writes: DICOM-SEG of the series that the cases were made of."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.scan.nifti import read_image
from lungseg.scan.orientation import LPS_TO_SPL
from lungseg.store.cases import Store
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, Tissue


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_dicom_seg_of_each_case_holds_the_voxels_of_its_label_map(
    finished: Path, manifest: Path, tmp_path: Path
) -> None:
    highdicom = pytest.importorskip("highdicom", reason="extra 'dicomseg' is not installed")
    out = tmp_path / "out"
    call("refine", finished / "store", "--export", out, "--dicom-seg", "--dicom-sr", "--source", manifest.parent)
    for case_id in Store(finished / "store").case_ids():
        labels = read_image(out / f"{case_id}.nii.gz", integer=True)
        segmentation = highdicom.seg.segread(out / f"{case_id}.seg.dcm")
        volume = segmentation.get_volume(combine_segments=True)
        voxels = np.argwhere(np.asarray(volume.array) > 0)
        world_lps = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        index = np.rint(labels.geometry.to_index(world_lps @ LPS_TO_SPL.T)).astype(int)
        assert np.array_equal(np.unique(index, axis=0), np.argwhere(labels.array > 0))
        report = highdicom.sr.srread(out / f"{case_id}.sr.dcm")
        assert report.StudyInstanceUID == segmentation.StudyInstanceUID
        groups = {g.tracking_identifier for g in report.content.get_volumetric_roi_measurement_groups()}
        assert groups == {segment.SegmentLabel for segment in segmentation.SegmentSequence}
    files = {path.name for path in out.iterdir()}
    assert not [name for name in files if name.endswith(".partial")]


def test_a_case_without_usable_uids_keeps_its_other_files(finished: Path, manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="extra 'dicomseg' is not installed")
    first, second = Store(finished / "store").case_ids()
    source = tmp_path / "Zebrafink"
    for path in sorted((manifest.parent / first).rglob("*.dcm")):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = "1.2"  # of equal size, so that the series is known again
        (source / path.name).parent.mkdir(parents=True, exist_ok=True)
        dataset.SOPInstanceUID = "1" * len(pydicom.dcmread(path).SOPInstanceUID)
        dataset.save_as(source / path.name)
    text = call(
        "refine", finished / "store", "--export", tmp_path / "o", "--dicom-seg", "--source", source, "-q", code=3
    )
    assert "no DICOM-SEG" in text
    assert "is not a valid DICOM UID" in text
    assert "no series below --source is the scan" in text
    assert "as NIfTI" in text
    assert "Zebrafink" not in text
    for case_id in (first, second):
        assert (tmp_path / "o" / f"{case_id}.nii.gz").is_file()
        assert not (tmp_path / "o" / f"{case_id}.seg.dcm").exists()
    table = (tmp_path / "o" / "quantification.csv").read_text(encoding="utf-8")
    assert f"\n{first}," in table


def test_posteriors_add_up_on_the_grid_of_the_scan(finished: Path, tmp_path: Path) -> None:
    call("refine", finished / "store", "--export", tmp_path, "--posteriors")
    for case_id in Store(finished / "store").case_ids():
        labels = read_image(tmp_path / f"{case_id}.nii.gz", integer=True)
        percent = {}
        for tissue in MIXTURE_TISSUES:
            found = read_image(tmp_path / "posteriors" / f"{case_id}-{TISSUES[tissue].name}.nii.gz", integer=True)
            assert found.geometry.is_close(labels.geometry, tolerance_voxels=1e-3)
            percent[tissue] = found.array
        total = np.sum(list(percent.values()), axis=0, dtype=np.int64)
        assert np.abs(total[total > 0] - 100).max() <= 3  # each is rounded
        assert np.mean(total[labels.array > 0] > 0) > 0.95  # the rim of a finer scan lies beyond the working grid
        best = np.argmax([percent[tissue] for tissue in MIXTURE_TISSUES], axis=0) + 1
        both = (total > 0) & (labels.array > 0)
        assert np.mean(best[both] == labels.array[both]) > 0.8  # fusion moves contours, not tissue
        entropy = read_image(tmp_path / "posteriors" / f"{case_id}-entropy.nii.gz", integer=True).array
        highest = np.max(list(percent.values()), axis=0)
        assert entropy[both & (highest >= 99)].max(initial=0) <= 8 < entropy[both & (highest < 60)].min(initial=100)


def test_names_and_colours_for_viewers(finished: Path) -> None:
    table = (finished / "results" / "tissues.ctbl").read_text(encoding="utf-8").splitlines()
    assert table[0].startswith("# Color table file")
    rows = {int(line.split()[0]): line.split()[1:] for line in table if not line.startswith("#")}
    assert rows[0] == ["Background", "0", "0", "0", "0"]
    assert rows[3] == ["Ground_glass", *map(str, TISSUES[Tissue.GGO].colour), "255"]
    assert set(rows) == {0, 1, 2, 3, 4, 5, 6, 255}
    text = (finished / "results" / "tissues-itksnap.txt").read_text(encoding="utf-8")
    pattern = r'^ *(\d+) +(\d+) +(\d+) +(\d+) +([01]) +([01]) +([01]) +"(.*)"$'
    found = {int(label): (name, (r, g, b)) for label, r, g, b, *_, name in re.findall(pattern, text, re.MULTILINE)}
    assert {label: found[label][0] for label in (0, 3, 255)} == {
        0: "Clear Label",
        3: "Ground glass",
        255: "Unclassified lung",
    }
    assert found[5][1] == tuple(map(str, TISSUES[Tissue.CONSOLIDATION].colour))


def test_dicom_seg_needs_its_source(finished: Path, tmp_path: Path) -> None:
    assert "go together" in call("refine", finished / "store", "--export", tmp_path / "o", "--dicom-seg", code=2)
    assert "needs --dicom-seg" in call("refine", finished / "store", "--export", tmp_path / "o", "--dicom-sr", code=2)
    assert "--export" in call("refine", finished / "store", "--dicom-seg", "--source", tmp_path, code=2)


def test_without_highdicom_it_stops_before_any_work(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "highdicom", None)
    text = call("refine", finished / "store", "--export", tmp_path / "o", "--dicom-seg", "--source", tmp_path, code=5)
    assert "pip install 'lungseg[dicomseg]'" in text
    assert not (tmp_path / "o").exists()
