"""NIfTI, NRRD and MetaImage: exact round trips on the file's own grid, SimpleITK as oracle, and every refusal."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import signal
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import (
    AXIAL,
    GRID,
    ORIENTATIONS,
    ct,
    patched,
    raw_header,
    stored_affine,
    write_nifti,
)

from lungseg.errors import InputError, ResourceError
from lungseg.scan.nifti import read_image, write_image
from lungseg.scan.volume import Geometry, Volume


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A valid uncompressed NIfTI written by SimpleITK (qform and sform set)."""
    path = tmp_path / "plain.nii"
    image = sitk.GetImageFromArray(ct())
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((-40.25, 12.5, -310.0))
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (8.0, -5.0, 12.0)], ids=["straight", "oblique"])
@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_round_trip_in_all_48_orientations(tmp_path: Path, axes, flips, tilt) -> None:
    truth = ct()
    sform, shape = stored_affine(axes, flips, tilt)
    stored = np.flip(truth, tuple(i for i in range(3) if flips[i])).transpose([axes.index(i) for i in range(3)])
    assert stored.shape == shape
    source = tmp_path / "in.nii"
    write_nifti(source, np.ascontiguousarray(stored), sform)

    volume = read_image(source)
    assert np.array_equal(volume.array, truth)
    assert (volume.stored_axes, volume.stored_flips) == (axes, flips)
    assert np.allclose(volume.geometry.to_world((0, 0, 0)), GRID.origin_mm, atol=1e-4)

    labels = (truth > 0).astype(np.uint8)
    write_image(
        tmp_path / "out.nii.gz",
        labels,
        volume.geometry,
        stored_axes=volume.stored_axes,
        stored_flips=volume.stored_flips,
    )
    before, after = raw_header(source), raw_header(tmp_path / "out.nii.gz")
    assert after["dim"][:4] == before["dim"][:4]
    assert np.allclose(after["sform"], before["sform"], atol=2e-5)
    assert np.allclose(np.abs(after["pixdim"][1:4]), before["pixdim"][1:4], atol=1e-6)
    written = np.frombuffer(after["voxels"], np.uint8).reshape(shape)
    assert np.array_equal(written, stored > 0)
    assert after["codes"][0] > 0
    assert after["codes"][1] > 0
    again = read_image(tmp_path / "out.nii.gz", integer=True)
    assert np.array_equal(again.array, labels)
    assert again.geometry.is_close(volume.geometry, tolerance_voxels=1e-3)


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS[::5])
def test_geometry_equals_simpleitk(tmp_path: Path, axes, flips) -> None:
    """World position of one voxel, read by us and by SimpleITK, by sform and by qform alone."""
    sform, shape = stored_affine(axes, flips, (8.0, -5.0, 12.0))
    array = np.full(shape, -850, np.int16)
    array[:, ::2] = 40
    array[1, 2, 3] = 500
    write_nifti(tmp_path / "s.nii", array, sform)
    write_image(tmp_path / "q.nii.gz", *_args(read_image(tmp_path / "s.nii")))
    both = gzip.decompress((tmp_path / "q.nii.gz").read_bytes())
    (tmp_path / "q.nii").write_bytes(both[:254] + b"\0\0" + both[256:280] + bytes(48) + both[328:])  # sform unset
    for name in ("s.nii", "q.nii"):
        image = sitk.ReadImage(str(tmp_path / name))
        index = np.argwhere(sitk.GetArrayFromImage(image) == 500)[0]
        expected = image.TransformContinuousIndexToPhysicalPoint([float(v) for v in index[::-1]])
        volume = read_image(tmp_path / name)
        ours = volume.geometry.to_world(np.argwhere(volume.array == 500)[0])
        assert np.allclose(ours[::-1], expected, atol=1e-3)


def _args(volume: Volume) -> tuple[np.ndarray, Geometry]:
    return volume.array, volume.geometry


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha", "mhd"])
def test_all_formats_give_the_same_volume(tmp_path: Path, suffix: str) -> None:
    array = ct()
    image = sitk.GetImageFromArray(array[::-1])
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((-40.25, 12.5, -310.0 + 7 * 2.5))
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, -1))
    path = tmp_path / f"naïve -name with space.{suffix}" if suffix != "mhd" else tmp_path / "scan.mhd"
    sitk.WriteImage(image, str(path))
    volume = read_image(path)
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype == np.int16
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-4)
    assert volume.stored_flips == (True, False, False)
    assert volume.notes == ()
    assert volume.acquisition == {}


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_voxel_types_and_scaling(tmp_path: Path, dtype) -> None:
    array = ct()
    write_nifti(tmp_path / "a.nii", (array + 1024).astype(dtype), AXIAL)
    volume = read_image(patched(tmp_path / "a.nii", (112, "2f", (1.0, -1024.0))))
    assert np.array_equal(volume.array, array)
    with pytest.raises(InputError, match=r"a\.nii.*shifted by \+1024"):
        read_image(tmp_path / "a.nii")


def test_big_endian_file(tmp_path: Path) -> None:
    array = ct()
    write_nifti(tmp_path / "a.nii", array, AXIAL)
    data = bytearray((tmp_path / "a.nii").read_bytes())
    for fmt, offset in (("i", 0), ("8h", 40), ("2h", 70), ("8f", 76), ("3f", 108), ("2h", 252), ("12f", 280)):
        struct.pack_into(">" + fmt, data, offset, *struct.unpack_from("<" + fmt, data, offset))
    data[352:] = array.astype(">i2").tobytes()
    (tmp_path / "b.nii").write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "b.nii").array, array)


def test_row_14_padding_is_set_to_air_and_noted(tmp_path: Path) -> None:
    array = ct()
    array[0] = -3024
    write_nifti(tmp_path / "a.nii.gz", array, AXIAL)
    volume = read_image(tmp_path / "a.nii.gz")
    assert volume.array.min() == -1024
    assert (volume.array[0] == -1024).all()
    assert volume.notes == ("12 % of voxels lay below -1024 HU (padding) and were set to it",)


@pytest.mark.parametrize(
    ("edits", "phrase"),
    [
        ([(76, "4f", (1.0, 0.0, 0.75, 2.5))], "strictly positive"),
        ([(76, "4f", (1.0, -0.5, 0.75, 2.5))], "strictly positive"),
        ([(76, "4f", (1.0, float("nan"), 0.75, 2.5))], "strictly positive"),
        ([(76, "4f", (1.0, 0.0005, 0.00075, 0.0025))], "not plausible"),
        ([(280, "12f", (-0.09, 0, 0, 0, 0, -0.09, 0, 0, 0, 0, 0.09, 0))], "not plausible"),
        ([(252, "2h", (0, 0))], "left and right are unknown"),
        ([(280, "2f", (-0.5, 0.3))], "right angles"),
        ([(280, "f", (float("nan"),))], "damaged header"),
        ([(292, "f", (float("inf"),))], "damaged header"),
        ([(40, "5h", (4, 10, 9, 4, 2))], "extract one volume"),
        ([(40, "3h", (2, 10, 72))], "three-dimensional.*volume of one slice"),
        ([(40, "h", (9,))], "three-dimensional"),
        ([(70, "h", (128,))], "datatype 128"),
        ([(108, "f", (float("nan"),))], "data offset"),
        ([(108, "f", (4000.0,))], "truncated"),
        ([(108, "f", (1e6,))], "truncated"),
        ([(42, "3h", (10, 9, 9))], "truncated"),
        ([(0, "i", (540,))], "NIfTI-2"),
        ([(344, "4s", (b"ni1\0",))], "no single-file"),
    ],
)
def test_row_25_28_29_30_bad_nifti_headers_are_refused(plain: Path, edits, phrase: str) -> None:
    with pytest.raises(InputError, match=phrase) as caught:
        read_image(patched(plain, *edits))
    assert "patched.nii" in str(caught.value)


def test_header_that_declares_an_absurd_size(plain: Path) -> None:
    with pytest.raises(ResourceError, match="30000 x 30000 x 30000"):
        read_image(patched(plain, (42, "3h", (30000, 30000, 30000))))


@pytest.mark.parametrize(
    ("edits", "note"),
    [
        ([(112, "2f", (0.0, 5.0))], "scaling is 0 or not a number"),
        ([(112, "2f", (float("nan"), 0.0))], "scaling is 0 or not a number"),
        ([(292, "f", (99.0,))], "disagree"),
        ([(76, "f", (-1.0,))], "disagree"),
        ([(268, "f", (float("inf"),))], "qform is not valid"),
    ],
)
def test_row_28_32_odd_headers_are_read_with_a_note(plain: Path, edits, note: str) -> None:
    volume = read_image(patched(plain, *edits))
    assert np.array_equal(volume.array, ct())
    assert note in volume.notes[0]


def test_row_30_units_of_metres_are_understood(plain: Path) -> None:
    sform = np.array(raw_header(plain)["sform"]) / 1000
    origin = np.array(raw_header(plain)["qform"][3:]) / 1000
    path = patched(
        plain,
        (123, "B", (1,)),
        (80, "3f", (0.0005, 0.00075, 0.0025)),
        (268, "3f", tuple(origin)),
        (280, "12f", tuple(sform)),
    )
    volume = read_image(path)
    assert volume.notes == ()
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-3)


def test_row_28_slight_non_orthonormality_is_repaired(plain: Path) -> None:
    path = patched(plain, (252, "2h", (0, 1)), (284, "f", (2e-4,)))
    matrix = np.asarray(read_image(path).geometry.direction)
    assert np.abs(matrix.T @ matrix - np.eye(3)).max() < 1e-12


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, -8, -3])
def test_row_25_truncated_gzip_is_refused(tmp_path: Path, kept: float) -> None:
    """SimpleITK fills the missing slices with zeros; that must never happen."""
    write_nifti(tmp_path / "whole.nii.gz", ct((20, 20, 20)), AXIAL)
    data = (tmp_path / "whole.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(data[: int(kept * len(data)) if kept > 0 else int(kept)])
    with pytest.raises(InputError, match=r"cut\.nii\.gz.*truncated"):
        read_image(tmp_path / "cut.nii.gz")


def test_row_25_flipped_bit_in_gzip_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", ct((20, 20, 20)), AXIAL)
    data = bytearray((tmp_path / "a.nii.gz").read_bytes())
    data[len(data) // 2] ^= 0x10
    (tmp_path / "a.nii.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.nii\.gz"):
        read_image(tmp_path / "a.nii.gz")


def test_row_25_more_data_than_declared_is_refused(plain: Path) -> None:
    whole = plain.read_bytes()
    plain.write_bytes(whole + bytes(100))  # less than a slice along any axis: 144 bytes
    assert np.array_equal(read_image(plain).array, ct())
    for more in (144, 2**20):
        plain.write_bytes(whole + bytes(more))
        with pytest.raises(InputError, match="more bytes of voxels than its header"):
            read_image(plain)


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_row_26_nan_and_infinity_are_counted(tmp_path: Path, suffix: str) -> None:
    """SimpleITK turns NaN in NIfTI into 0 without a word."""
    array = ct().astype(np.float32)
    array[1, 2, 3] = np.nan
    array[4, 4, :2] = [np.inf, -np.inf]
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    with pytest.raises(InputError, match="3 voxels are NaN or infinite"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "suffix"), [(b"", "nii"), (b"hello" * 200, "nii.gz"), (b"NRRD0004\nrubbish\n\n", "nrrd"), (b"", "mha")]
)
def test_row_25_files_of_another_format_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.{suffix}"):
        read_image(path)


def test_missing_unknown_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such image file"):
        read_image(tmp_path / "none.nii.gz")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match="unknown image format"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_row_25_truncated_itk_formats_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(ct()), str(path))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_image(path)


def test_row_27_several_volumes_and_channels(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(ct())
    image.SetSpacing((0.5, 0.75, 2.5))
    for suffix in ("nii.gz", "mha", "nrrd"):
        sitk.WriteImage(sitk.JoinSeries([image, image]), str(tmp_path / f"two.{suffix}"))
        # SimpleITK writes a NRRD of four axes without an anatomical space
        with pytest.raises(InputError, match="three-dimensional" if suffix != "nrrd" else "no anatomical space"):
            read_image(tmp_path / f"two.{suffix}")
    sitk.WriteImage(sitk.JoinSeries([image]), str(tmp_path / "one.mha"))
    assert np.array_equal(read_image(tmp_path / "one.mha").array, ct())
    colour = sitk.Compose([sitk.Cast(image, sitk.sitkUInt8)] * 3)
    sitk.WriteImage(colour, str(tmp_path / "rgb.mha"))
    with pytest.raises(InputError, match="3 channels"):
        read_image(tmp_path / "rgb.mha")


def test_sheared_nrrd_is_refused(tmp_path: Path) -> None:
    header = (
        b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 2 2\n"
        b"space directions: (1,0.3,0) (0,1,0) (0,0,1)\nencoding: raw\nendian: little\nspace origin: (0,0,0)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(header + bytes(16))
    with pytest.raises(InputError, match="right angles"):
        read_image(tmp_path / "a.nrrd")


@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
@pytest.mark.parametrize("target", ["/etc/hostname", "../secret.raw", "LIST"])
def test_headers_that_name_other_files_are_refused(tmp_path: Path, name: str, target: str) -> None:
    text = f"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_CHAR\nElementDataFile = {target}\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="in another file"):
        read_image(tmp_path / name, integer=True)
    nrrd = f"NRRD0004\ntype: char\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: {target}\n\n"
    (tmp_path / "a.nrrd").write_text(nrrd)
    with pytest.raises(InputError, match="in another file"):
        read_image(tmp_path / "a.nrrd", integer=True)


def test_row_34_label_maps(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 7, GRID.shape)
    for dtype in (np.uint8, np.int16, np.int32, np.float32):
        write_nifti(tmp_path / "l.nii.gz", labels.astype(dtype), AXIAL)
        volume = read_image(tmp_path / "l.nii.gz", integer=True)
        assert volume.array.dtype == np.uint8
        assert np.array_equal(volume.array, labels)
    write_nifti(tmp_path / "l.nii.gz", (labels * 500).astype(np.uint16), AXIAL)
    assert read_image(tmp_path / "l.nii.gz", integer=True).array.dtype == np.uint16
    near = labels.astype(np.float32) * np.float32(0.9999999)
    write_nifti(tmp_path / "l.nii.gz", near, AXIAL)
    assert np.array_equal(read_image(tmp_path / "l.nii.gz", integer=True).array, labels)
    for wrong, phrase in ((0.5, r"0\.5"), (1.01, r"1\.01"), (-1.0, "-1"), (70000.0, "70000")):
        bad = labels.astype(np.float32)
        bad[2, 3, 4] = wrong
        write_nifti(tmp_path / "bad.nii.gz", bad, AXIAL)
        with pytest.raises(InputError, match=f"whole numbers.*{phrase}"):
            read_image(tmp_path / "bad.nii.gz", integer=True)


@pytest.mark.parametrize(("dtype", "levels"), [(np.uint8, 255), (np.int16, 65535)])
@pytest.mark.parametrize("top", [1, 2, 3, 7])
def test_row_34_labels_scaled_to_whole_numbers_by_their_writer(tmp_path: Path, dtype, levels: int, top: int) -> None:
    """As nibabel stores a float label map in a file of whole numbers: 1 of 0-2 reads as 1.004."""
    labels = np.random.default_rng(0).integers(0, top + 1, GRID.shape)
    low = np.iinfo(dtype).min
    slope = np.float32(top / levels)
    inter = np.float32(-low * np.float64(slope))
    path = tmp_path / "l.nii"
    write_nifti(path, (np.rint(labels * (levels / top)) + low).astype(dtype), AXIAL)
    volume = read_image(patched(path, (112, "2f", (slope, inter))), integer=True)
    assert np.array_equal(volume.array, labels)
    for step in (slope, 0.5):
        write_nifti(path, np.full(GRID.shape, 0.5 / step).astype(dtype), AXIAL)
        probabilities = patched(path, (112, "2f", (step, 0.25)))
        with pytest.raises(InputError, match="whole numbers"):
            read_image(probabilities, integer=True)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int16, np.float32])
def test_written_files_are_deterministic_and_blank(tmp_path: Path, dtype) -> None:
    array = (ct() > 0).astype(dtype)
    paths = [tmp_path / "one.nii.gz", tmp_path / "two of another name.nii.gz"]
    for path in paths:
        write_image(path, array, GRID)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first[4:8] == bytes(4)  # gzip: no time
    assert not first[3]  # gzip: no file name, no comment
    header = raw_header(paths[0])
    assert header["text"] == bytes(len(header["text"]))
    assert header["units"] & 7 == 2
    assert np.allclose(header["sform"].reshape(3, 4)[:, 3], (40.25, -12.5, -310.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
    image = sitk.ReadImage(str(paths[0]))
    assert np.array_equal(sitk.GetArrayFromImage(image), array)
    assert np.allclose(image.GetOrigin(), (-40.25, 12.5, -310.0))


def test_write_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"written as \.nii\.gz"):
        write_image(tmp_path / "a.nrrd", ct(), GRID)
    with pytest.raises(InputError, match="no such folder"):
        write_image(tmp_path / "none" / "a.nii.gz", ct(), GRID)
    with pytest.raises(InputError, match="float64"):
        write_image(tmp_path / "a.nii.gz", ct().astype(np.float64), GRID)
    with pytest.raises(InputError, match="on a grid of shape"):
        write_image(tmp_path / "a.nii.gz", ct()[1:], GRID)
    (tmp_path / "a.nii.gz").mkdir()
    with pytest.raises(ResourceError, match="could not be written"):
        write_image(tmp_path / "a.nii.gz", ct(), GRID)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_resampled_grid_is_written_in_the_files_orientation(tmp_path: Path) -> None:
    """Another spacing than the file's own still keeps its axis order."""
    sform, shape = stored_affine((2, 0, 1), (True, False, True), (0.0, 0.0, 0.0))
    write_nifti(tmp_path / "in.nii", np.resize(ct(), shape), sform)
    volume = read_image(tmp_path / "in.nii")
    grid = volume.geometry.with_spacing((1.25, 1.5, 1.0))
    volume = replace(volume, array=np.zeros(grid.shape, np.uint8), geometry=grid)
    write_image(
        tmp_path / "out.nii.gz", *_args(volume), stored_axes=volume.stored_axes, stored_flips=volume.stored_flips
    )
    again = read_image(tmp_path / "out.nii.gz", integer=True)
    assert (again.stored_axes, again.stored_flips) == ((2, 0, 1), (True, False, True))
    assert again.geometry.is_close(grid, tolerance_voxels=1e-3)


def test_real_files(shared_data: Path) -> None:
    scan = read_image(shared_data / "cip-small" / "ct-64.nrrd")
    assert scan.array.shape == (79, 64, 64)
    assert scan.notes == ()
    labels = read_image(shared_data / "cip-small" / "lm-64.nrrd", integer=True)
    assert labels.array.dtype == np.uint16
    lung = (labels.array % 256 >= 9) & (labels.array % 256 <= 14)
    inside = scan.array[lung]
    assert inside.mean() == pytest.approx(-873, abs=12)  # data README: mean -873 HU
    follow_up = read_image(shared_data / "elastix-emphysema" / "ct.mha")
    mask = read_image(shared_data / "elastix-emphysema" / "right_lung_mask.mha", integer=True)
    assert mask.geometry.is_close(follow_up.geometry)
    values = follow_up.array[mask.array == 1]
    assert values.mean() == pytest.approx(-896, abs=5)
    assert 100 * (values <= -950).mean() == pytest.approx(45.5, abs=1.0)
    phantom = read_image(shared_data / "ibsi" / "ct_phantom" / "image" / "phantom.nii.gz")
    reference = sitk.ReadImage(str(shared_data / "ibsi" / "ct_phantom" / "image" / "phantom.nii.gz"))
    assert np.array_equal(phantom.array, sitk.GetArrayFromImage(reference))
    with pytest.raises(InputError, match="not HU"):
        read_image(shared_data / "pyradiomics-baseline" / "brain1_image.nrrd")


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS[::7])
def test_written_header_equals_simpleitk(tmp_path: Path, axes, flips) -> None:
    """Grid of a written file, by qform and by sform, as SimpleITK sees it, in any orientation and handedness."""
    sform, shape = stored_affine(axes, flips, (170.0, -75.0, 112.0))
    write_nifti(tmp_path / "in.nii", np.ones(shape, np.uint8), sform)
    volume = read_image(tmp_path / "in.nii", integer=True)
    out = tmp_path / "out.nii.gz"
    write_image(out, *_args(volume), stored_axes=volume.stored_axes, stored_flips=volume.stored_flips)
    data = gzip.decompress(out.read_bytes())
    (tmp_path / "q.nii").write_bytes(data[:254] + b"\0\0" + data[256:280] + bytes(48) + data[328:])
    (tmp_path / "s.nii").write_bytes(data[:252] + b"\0\0" + data[254:])
    wanted = sform[:, :3] / np.linalg.norm(sform[:, :3], axis=0) * np.array([[-1.0], [-1.0], [1.0]])
    for name in ("q.nii", "s.nii"):
        image = sitk.ReadImage(str(tmp_path / name))
        assert np.allclose(np.reshape(image.GetDirection(), (3, 3)), wanted, atol=1e-5)
        assert np.allclose(image.GetOrigin(), sform[:, 3] * (-1, -1, 1), atol=1e-3)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    """A partial file goes with its process; one of a process that lives stays, and so does that of another image."""
    grid, array = Geometry((4, 5, 6), (1.0, 1.0, 1.0)), np.zeros((4, 5, 6), np.uint8)
    for name in ("a.nii.gz", "b.nii.gz"):
        child = multiprocessing.get_context("spawn").Process(target=_die_while_writing, args=(tmp_path / name,))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.partial"))) == 2
    write_image(tmp_path / "a.nii.gz", array, grid)
    (of_b,) = tmp_path.glob(".*.partial")
    of_parent = of_b.with_name(f"{of_b.name.rsplit('.', 2)[0]}.{os.getppid()}.partial")
    of_parent.write_bytes(b"")
    write_image(tmp_path / "b.nii.gz", array, grid)
    assert list(tmp_path.glob(".*.partial")) == [of_parent]


def _die_while_writing(path: Path) -> None:
    Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
    write_image(path, np.zeros((4, 5, 6), np.uint8), Geometry((4, 5, 6), (1.0, 1.0, 1.0)))
