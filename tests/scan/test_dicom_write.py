"""Digital phantoms as DICOM: exact, deterministic, readable by others."""

from __future__ import annotations

import hashlib
import locale
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_fixture import (
    CT,
    chest,
    read_only_series,
)

from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom import choose_series, find_series, write_dicom_series
from lungseg.scan.volume import Geometry, Volume


def phantom(shape: tuple[int, int, int] = (8, 40, 36)) -> Volume:
    array = chest(shape)
    array[0, 0, 0], array[0, 0, 1] = -1024, 3071
    return Volume(array, Geometry(shape, (3.0, 0.7, 0.65), (-200.123456, -130.5, -120.0)))


def test_writing_leaves_the_locale_of_the_process(tmp_path: Path) -> None:
    """GDCM sets it to `C`: everything read as text afterwards would be taken for ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    write_dicom_series(tmp_path / "one", phantom(), patient_id="P1", series_seed="seed 7")
    assert locale.setlocale(locale.LC_ALL) == before


@pytest.mark.parametrize("compress", [True, False])
def test_phantom_round_trip_is_exact_and_deterministic(tmp_path: Path, compress: bool) -> None:
    volume = phantom()
    options = {"patient_id": "P1", "series_seed": "seed 7", "compress": compress}
    first = write_dicom_series(tmp_path / "one", volume, **options)
    second = write_dicom_series(tmp_path / "two", volume, **options)
    assert [p.name for p in first] == [f"{k:03d}.dcm" for k in range(8)]
    digests = [[hashlib.sha256(p.read_bytes()).hexdigest() for p in paths] for paths in (first, second)]
    assert digests[0] == digests[1]
    read = read_only_series(tmp_path / "one")
    assert np.array_equal(read.array, volume.array)
    assert read.geometry.is_close(volume.geometry, tolerance_voxels=1e-6)
    assert read.notes == ()
    assert read.acquisition == {
        "kernel": "B40f",
        "kvp": 120.0,
        "slice_thickness_mm": 3.0,
        "manufacturer": "lungseg phantom",
        "modality": "CT",
        "spacing_mm": pytest.approx([3.0, 0.7, 0.65]),
    }


def test_phantom_tags_for_other_viewers(tmp_path: Path) -> None:
    volume = phantom()
    paths = write_dicom_series(
        tmp_path, volume, patient_id="P1", series_seed="a", study_seed="s", kernel="B70f", compress=False
    )
    slices = [pydicom.dcmread(p) for p in paths]
    assert len({ds.SOPInstanceUID for ds in slices}) == 8
    for tag in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        (uid,) = {getattr(ds, tag) for ds in slices}
        assert uid.is_valid
        assert uid.startswith("2.25.")
    for k, ds in enumerate(slices):
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert (ds.SOPClassUID, ds.Modality, ds.PatientPosition, ds.PatientID) == (CT, "CT", "HFS", "P1")
        assert (ds.ConvolutionKernel, ds.KVP, ds.SliceThickness) == ("B70f", 120, 3)
        assert ds.Manufacturer == "lungseg phantom"
        assert (ds.RescaleIntercept, ds.RescaleSlope) == (-1024, 1)
        assert ds.InstanceNumber == k + 1
        assert list(ds.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
        assert [float(v) for v in ds.ImagePositionPatient] == pytest.approx([-120.0, -130.5, -200.123456 + 3.0 * k])
        assert [float(v) for v in ds.PixelSpacing] == [0.7, 0.65]
        assert ds.StudyDate == ds.SeriesDate == ds.ContentDate == "20000101"
        assert np.array_equal(ds.pixel_array.astype(int) - 1024, volume.array[k])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)
    assert image.GetSpacing() == pytest.approx((0.65, 0.7, 3.0))


def test_two_kernels_of_one_phantom_form_one_study(tmp_path: Path) -> None:
    for kernel in ("B70f", "B40f"):
        write_dicom_series(
            tmp_path / kernel, phantom(), patient_id="P1", series_seed=f"x/{kernel}", study_seed="x", kernel=kernel
        )
    choice = choose_series(find_series(tmp_path).series)
    assert choice.chosen.acquisition["kernel"] == "B40f"
    assert len(choice.others) == 1


def test_phantoms_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    volume = phantom()
    too_dense = Volume(np.full(volume.array.shape, 32000, np.int16), volume.geometry)
    with pytest.raises(InputError, match="-1024 to 31743"):
        write_dicom_series(tmp_path, too_dense, patient_id="P1", series_seed="a")
    (tmp_path / "x" / "000.dcm").mkdir(parents=True)
    with pytest.raises(ResourceError, match=r"000\.dcm: could not be written"):
        write_dicom_series(tmp_path / "x", volume, patient_id="P1", series_seed="a")


def test_written_bytes_do_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    """GDCM keeps global state between reading and writing; the phantoms' bytes must not show it."""
    rng = np.random.default_rng(0)
    volume = Volume(rng.integers(-1000, 100, (8, 20, 24)).astype(np.int16), Geometry((8, 20, 24), (3.0, 2.0, 2.0)))
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from lungseg.scan.dicom import find_series, read_series, write_dicom_series\n"
        "from lungseg.scan.volume import Geometry, Volume\n"
        "rng = np.random.default_rng(0)\n"
        "array = rng.integers(-1000, 100, (8, 20, 24)).astype(np.int16)\n"
        "volume = Volume(array, Geometry((8, 20, 24), (3.0, 2.0, 2.0)))\n"
        "for name in ('first', 'second'):\n"
        "    folder = Path(sys.argv[1]) / name\n"
        "    write_dicom_series(folder, volume, patient_id='p', series_seed='s')\n"
        "    read_series(find_series(folder).series[0])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    write_dicom_series(tmp_path / "third", volume, patient_id="p", series_seed="s")
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "third" / path.name).read_bytes()
