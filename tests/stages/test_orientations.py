"""However the axes of a file run: the same voxels, lungs, place in the world and, at the end, the same labels.

The files are made by SimpleITK's permute and flip filters, which know where every voxel lies, and by pydicom: nothing
of the code under test writes them.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations, product
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pipeline_fixture import PHANTOM, QUIET
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from lungseg.config.run import RunConfig
from lungseg.scan.lungs import find_lungs
from lungseg.scan.nifti import read_image
from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom
from lungseg.scan.sources import find_sources
from lungseg.scan.volume import Volume
from lungseg.stages.run import run

ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]
PIPELINE = [((0, 1, 2), (True, False, False)), ((2, 0, 1), (False, True, False)), ((1, 2, 0), (True, True, True)),
            ((0, 2, 1), (False, False, True))]  # fmt: skip
"""A left-handed one, two rotated ones, and the one that becomes a sagittal DICOM series."""
LUNG_HU = -500


def to_itk(volume: Volume) -> sitk.Image:
    """The canonical volume as an image in ITK's order (x, y, z) and world (L, P, S)."""
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.geometry.spacing_mm[::-1])
    image.SetOrigin(volume.geometry.origin_mm[::-1])
    image.SetDirection(np.asarray(volume.geometry.direction)[::-1, ::-1].ravel().tolist())
    return image


def turned(volume: Volume, axes: tuple[int, ...], flips: tuple[bool, ...]) -> sitk.Image:
    """The same voxels at the same places, stored along other axes."""
    return sitk.Flip(sitk.PermuteAxes(to_itk(volume), axes), [bool(flip) for flip in flips], flipAboutOrigin=False)


def centroid_lps(image: sitk.Image) -> np.ndarray:
    """Centre of what is darker than tissue, in world millimetres (L, P, S), by SimpleITK alone."""
    index = np.argwhere(sitk.GetArrayViewFromImage(image) < LUNG_HU).mean(axis=0)[::-1]
    return np.asarray(image.TransformContinuousIndexToPhysicalPoint(index.tolist()))


def write_series(folder: Path, image: sitk.Image) -> Path:
    """Slices along the third axis of the image, position and cosines as SimpleITK says."""
    folder.mkdir(parents=True)
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    for k, pixels in enumerate(sitk.GetArrayViewFromImage(image)):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{k + 1}", "CT"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = "1.2.4", "1.2.5", "turned"
        ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], k + 1
        ds.ImagePositionPatient = [f"{v:.8g}" for v in image.TransformIndexToPhysicalPoint((0, 0, k))]
        ds.ImageOrientationPatient = [f"{v:.8g}" for v in (*direction[:, 0], *direction[:, 1])]
        ds.PixelSpacing = [f"{v:g}" for v in image.GetSpacing()[1::-1]]
        ds.Rows, ds.Columns = pixels.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.RescaleIntercept, ds.RescaleSlope = "0", "1"
        ds.PixelData = np.ascontiguousarray(pixels).astype("<i2").tobytes()
        ds["PixelData"].VR = "OW"
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        pydicom.dcmwrite(folder / f"{k:04d}", ds, enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def small() -> Volume:
    """A chest of 34 x 43 x 57 voxels with heart, spine and disease: no two axes look alike."""
    spec = PhantomSpec(extent_mm=(120.0, 140.0, 170.0), spacing_mm=(3.5, 3.25, 3.0), severity="moderate",
                       diseases=DISEASES)  # fmt: skip
    made = make_phantom(spec, seed=11)
    return Volume(made.volume_hu, made.geometry)


@cache
def lungs_of(voxels: bytes, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """``find_lungs``, once for the same bits."""
    return find_lungs(np.frombuffer(voxels, np.int16).reshape(shape), spacing_mm).labels


@pytest.fixture(scope="module")
def lungs(small: Volume) -> np.ndarray:
    labels = lungs_of(small.array.tobytes(), small.array.shape, small.geometry.spacing_mm)
    assert all((labels == side).any() for side in (1, 2))
    assert not np.array_equal(labels, labels[:, :, ::-1])
    return labels


def assert_same_scan(found: Volume, small: Volume, lungs: np.ndarray, centroid: np.ndarray) -> None:
    assert np.array_equal(found.array, small.array)
    assert found.geometry.is_close(small.geometry, tolerance_voxels=1e-3)
    assert np.array_equal(lungs_of(found.array.tobytes(), found.array.shape, found.geometry.spacing_mm), lungs)
    own = found.geometry.to_world(np.argwhere(found.array < LUNG_HU).mean(axis=0))
    assert np.abs(own[::-1] - centroid).max() < 0.1 * min(found.geometry.spacing_mm)


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_all_48_orientations_of_an_image_file_are_one_scan(
    small: Volume, lungs: np.ndarray, tmp_path: Path, axes: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    image = turned(small, axes, flips)
    path = tmp_path / "scan.nii"
    sitk.WriteImage(image, str(path))
    found = read_image(path)
    assert_same_scan(found, small, lungs, centroid_lps(image))
    stored = np.transpose(found.array, np.argsort(found.stored_axes))  # and back to the file's own order
    stored = np.flip(stored, [found.stored_axes[i] for i in range(3) if found.stored_flips[i]])
    assert np.array_equal(stored, sitk.GetArrayViewFromImage(image))


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_all_48_orientations_of_a_series_are_one_scan(
    small: Volume, lungs: np.ndarray, tmp_path: Path, axes: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    image = turned(small, axes, flips)
    (source,) = find_sources([write_series(tmp_path / "series", image)])
    assert_same_scan(source.read(), small, lungs, centroid_lps(image))


@pytest.mark.slow
def test_the_whole_pipeline_gives_the_same_labels_in_four_orientations(finished: Path, tmp_path: Path) -> None:
    spec = PhantomSpec(PHANTOM.extent_mm, PHANTOM.spacing_mm, PHANTOM.severity, DISEASES)
    made = make_phantom(spec, seed=11)
    scan = Volume(made.volume_hu, made.geometry)
    config = RunConfig(salt="test")
    results = []
    for number, (axes, flips) in enumerate([((0, 1, 2), (False, False, False)), *PIPELINE]):
        image = turned(scan, axes, flips)
        path, output = tmp_path / f"scan-{number}.nii", tmp_path / f"out-{number}"
        if number == len(PIPELINE):
            write_series(path := tmp_path / "series", image)
        else:
            sitk.WriteImage(image, str(path))
        (tmp_path / "manifest.csv").write_text(f"path,case_id\n{path.name},turned\n", encoding="utf-8")
        run(
            None, output, config, model=finished / "bundle.safetensors", manifest=tmp_path / "manifest.csv",
            execution=QUIET,
        ).require_complete()  # fmt: skip
        case = output / "store" / "cases" / "turned"
        with h5py.File(case / "labels.diffseglung.h5") as file, h5py.File(case / "clusters.diffseglung.h5") as clusters:
            made_of_it = [file["labels"][()], file["confidence"][()], clusters["posterior"][()]]
        exported = sitk.ReadImage(str(output / "results" / "turned.nii.gz"))
        assert exported.GetSize() == image.GetSize()  # on the scan's own grid, its own way round
        assert np.allclose(exported.GetDirection(), image.GetDirection(), atol=1e-5)
        assert np.allclose(exported.GetOrigin(), image.GetOrigin(), atol=1e-3)
        results.append([*made_of_it, read_image(output / "results" / "turned.nii.gz", integer=True).array])
    assert len(np.unique(results[0][2].argmax(axis=0))) > 2
    for result in results[1:]:
        assert all(np.array_equal(one, other) for one, other in zip(result, results[0], strict=True))
