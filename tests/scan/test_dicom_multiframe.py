"""Enhanced (multi-frame) CT: frames become slices by their functional groups, and then the same rules hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_fixture import CANARY, CT, ENHANCED, GRID, chest, read_only_series, refusal, save, write_folder
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom import choose_series, find_series, read_series, write_dicom_series
from lungseg.scan.volume import Geometry, Volume

LEGACY = "1.2.840.10008.5.1.4.1.1.2.2"
Change = Callable[[list[Dataset]], None]


def item(**tags: object) -> list[Dataset]:
    ds = Dataset()
    for tag, value in tags.items():
        setattr(ds, tag, value)
    return [ds]


def enhanced(slices: list[Dataset], *, shared: bool = True, sop_class: str = ENHANCED) -> Dataset:
    """One multi-frame dataset of single-frame ones, in the given order; what is equal goes to the shared groups."""
    first = slices[0]
    ds = Dataset()
    for tag in ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientName", "Manufacturer", "Modality", "Rows",
                "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):  # fmt: skip
        setattr(ds, tag, first[tag].value)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.SOPClassUID, ds.SOPInstanceUID, ds.NumberOfFrames = sop_class, pydicom.uid.generate_uid(), len(slices)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    common = Dataset()
    common.CTReconstructionSequence = item(ConvolutionKernel=first.get("ConvolutionKernel", ""))
    common.CTXRayDetailsSequence = item(KVP=first.get("KVP"))
    frames = []
    for s in slices:
        own = Dataset()
        own.PlanePositionSequence = item(ImagePositionPatient=s.ImagePositionPatient)
        own.FrameContentSequence = item(FrameAcquisitionNumber=int(s.AcquisitionNumber), StackID="1")
        target = common if shared else own
        target.PlaneOrientationSequence = item(ImageOrientationPatient=s.ImageOrientationPatient)
        target.PixelMeasuresSequence = item(PixelSpacing=s.PixelSpacing, SliceThickness="2.5")
        if "RescaleSlope" in s:
            own.PixelValueTransformationSequence = item(
                RescaleIntercept=s.RescaleIntercept, RescaleSlope=s.RescaleSlope, RescaleType="HU"
            )
        frames.append(own)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [common], frames
    ds.PixelData = b"".join(s.PixelData for s in slices)
    ds["PixelData"].VR = "OW"
    return ds


def single_frames(folder: Path, **options: object) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in write_folder(folder, **options)]


def write_enhanced(folder: Path, scratch: Path, change: Change | None = None, **options: object) -> Path:
    """The frames of a synthetic chest as one file, out of order."""
    slices = single_frames(scratch, **options)
    if change:
        change(slices)
    order = np.random.default_rng(5).permutation(len(slices))
    return save(enhanced([slices[k] for k in order]), folder / "multi.dcm")


@pytest.mark.parametrize("sop_class", [ENHANCED, LEGACY])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_row_18_frames_equal_single_slices(tmp_path: Path, syntax: str, shared: bool, sop_class: str) -> None:
    def rescale(ds: Dataset, k: int) -> None:
        stored = np.frombuffer(ds.PixelData, np.int16) - k  # each frame its own intercept
        ds.RescaleIntercept, ds.PixelData = str(-1024 + k), stored.tobytes()

    slices = single_frames(tmp_path / "single", edit=rescale)
    order = np.random.default_rng(0).permutation(9)
    save(enhanced([slices[k] for k in order], shared=shared, sop_class=sop_class), tmp_path / "m" / "x.dcm", syntax)
    (series,) = find_series(tmp_path / "m").series
    volume, original = read_series(series), read_only_series(tmp_path / "single")
    assert np.array_equal(volume.array, original.array)
    assert volume.geometry == original.geometry
    assert (volume.stored_axes, volume.stored_flips) == (original.stored_axes, original.stored_flips)
    assert volume.acquisition == original.acquisition | {"slice_thickness_mm": 2.5}
    assert CANARY not in repr(volume)
    facts = series.facts()
    assert (facts.slices, facts.multi_frame, facts.orientation) == (9, True, "axial")
    assert series.files == (tmp_path / "m" / "x.dcm",) * 9


@pytest.mark.parametrize("table", ["one fragment each", "offset table"])
@pytest.mark.parametrize("syntax", ["rle", "jpeg 2000"])
def test_row_18_compressed_frames(tmp_path: Path, syntax: str, table: str) -> None:
    slices = single_frames(tmp_path / "single")
    ds = enhanced(slices)
    fragments = 1 if table == "one fragment each" else 3
    if syntax == "rle":
        save(ds, tmp_path / "raw")
        ds.compress(RLELossless, generate_instance_uid=False)
        frames, uid = list(generate_frames(ds.PixelData, number_of_frames=9)), RLELossless
    else:
        volume = Volume(chest(), GRID)
        files = write_dicom_series(tmp_path / "j2k", volume, patient_id="P", series_seed="s", compress=True)
        packed = [pydicom.dcmread(path) for path in files]
        frames = [next(generate_frames(p.PixelData, number_of_frames=1)) for p in packed]
        uid = packed[0].file_meta.TransferSyntaxUID
        for name in ("BitsStored", "HighBit", "PixelRepresentation"):
            setattr(ds, name, packed[0][name].value)
    ds.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=fragments > 1)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    path = save(ds, tmp_path / "m" / "x.dcm", uid)
    assert np.array_equal(read_only_series(tmp_path / "m").array, chest())
    if fragments > 1:  # without the table nobody can say which fragment belongs to which frame
        ds.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=False)
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        save(ds, path, uid)
        with pytest.raises(InputError, match="fragments for 9 frames, and no table"):
            read_only_series(tmp_path / "m")


def test_row_18_real_slab_as_enhanced_ct(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "lidc0001-slab"
    original = read_only_series(folder)
    slices = [pydicom.dcmread(path) for path in sorted((folder / "dicom").iterdir())]
    for s in slices:
        s.AcquisitionNumber = 1
    save(enhanced(slices), tmp_path / "x.dcm")
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, original.array)
    assert volume.geometry == original.geometry


def move(k: int, z: float) -> Change:
    def change(slices: list[Dataset]) -> None:
        slices[k].ImagePositionPatient = [-40.25, 12.5, z]

    return change


def drop(k: int) -> Change:
    return lambda slices: slices.__delitem__(k)


def strip_rescale(slices: list[Dataset]) -> None:
    for s in slices:
        del s.RescaleSlope, s.RescaleIntercept


def no_position(slices: list[Dataset]) -> None:
    slices[2].ImagePositionPatient = None


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (drop(4), "missing slices: 1 between -302.50 and -297.50 mm"),
        (move(3, -301.9), "uneven slice spacing"),
        (strip_rescale, "RescaleSlope or RescaleIntercept is missing"),
        (no_position, "ImagePositionPatient is missing or damaged"),
        (lambda slices: slices.__delitem__(slice(4, 9)), "only 4 slices"),
    ],
)
def test_row_18_the_rules_of_single_frames_hold(tmp_path: Path, change: Change, phrase: str) -> None:
    write_enhanced(tmp_path / "m", tmp_path / "s", change)
    assert phrase in refusal(tmp_path / "m")


def test_row_18_gaps_between_frames_are_filled(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "m", tmp_path / "s", drop(4))
    volume = read_only_series(tmp_path / "m", options=ReadOptions(allow_gaps=1))
    assert volume.status == ("gaps-filled",)
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-3)


def test_row_18_two_time_points_are_refused_with_their_frames(tmp_path: Path) -> None:
    slices = single_frames(tmp_path / "a")
    later = single_frames(tmp_path / "b", array=chest(seed=1))
    for s in later:
        s.AcquisitionNumber = "2"
    save(enhanced(slices + later), tmp_path / "m" / "x.dcm")
    with pytest.raises(InputError, match=r"two different images at -310\.00 mm, frames \d+ and \d+ of x\.dcm.*1, 2"):
        read_only_series(tmp_path / "m")


def test_row_18_stacks_of_two_orientations_are_two_series(tmp_path: Path) -> None:
    slices = single_frames(tmp_path / "a")
    grid = Geometry(GRID.shape, (2.5, 2.2, 2.2), GRID.origin_mm)
    slices += single_frames(tmp_path / "b", geometry=grid, axes=(1, 0, 2))[:10]
    for s in slices:
        s.Rows, s.Columns, s.PixelData = 9, 10, s.PixelData[:180]
    save(enhanced(slices, shared=False), tmp_path / "m" / "x.dcm")
    scan = find_series(tmp_path / "m")
    assert sorted(s.facts().orientation for s in scan.series) == ["axial", "coronal"]
    assert len({s.key for s in scan.series}) == 2


def test_row_18_frames_without_a_description_are_refused(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "m", tmp_path / "s")
    ds = pydicom.dcmread(path)
    ds.PerFrameFunctionalGroupsSequence = list(ds.PerFrameFunctionalGroupsSequence)[:5]
    save(ds, path)
    assert "declares 9 frames, but describes 5 (functional groups)" in refusal(tmp_path / "m")
    ds.SOPClassUID = CT  # many frames in a class that has one
    save(ds, path)
    assert "9 frames without a geometry of their own" in refusal(tmp_path / "m")


def test_row_18_enhanced_and_single_frame_series_in_one_folder(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "m", tmp_path / "s")
    write_folder(tmp_path / "m", skip=(3, 4))
    choice = choose_series(find_series(tmp_path / "m").series)
    assert choice.chosen.facts().multi_frame
    assert "missing slices" in choice.others[0][1]
