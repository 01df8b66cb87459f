"""Image files that are not right as they stand: RELIABILITY rows 14, 15, 26-36, each format alike."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import AXIAL, GRID, ct, patched, raw_header, write_mha, write_nifti, write_nrrd

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.nifti import read_image, write_image


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A valid uncompressed NIfTI written by SimpleITK (qform and sform set)."""
    path = tmp_path / "plain.nii"
    image = sitk.GetImageFromArray(ct())
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((-40.25, 12.5, -310.0))
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_row_26_nan_becomes_air_when_asked(tmp_path: Path, suffix: str) -> None:
    array = ct().astype(np.float32)
    array[1, 2, 3] = np.nan
    array[4, 4, :2] = [np.inf, -np.inf]
    path = tmp_path / f"a.{suffix}"
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 2.5))
    sitk.WriteImage(image, str(path)) if suffix != "nii.gz" else write_nifti(path, array, AXIAL)
    volume = read_image(path, ReadOptions(nan_to_air=True))
    if suffix != "nii.gz":
        assert np.array_equal(volume.array, np.where(np.isfinite(array), array, -1024).astype(np.int16))
    assert volume.status == ("nan-replaced",)
    assert volume.notes == ("3 voxels were NaN or infinite and were set to -1024 HU, as asked",)


def test_row_26_nan_in_a_mask_is_refused_always(tmp_path: Path) -> None:
    labels = np.ones(GRID.shape, np.float32)
    labels[0, 0, 0] = np.nan
    write_nifti(tmp_path / "m.nii", labels, AXIAL)
    with pytest.raises(InputError, match=r"1 voxels are NaN or infinite; replace them .by 0"):
        read_image(tmp_path / "m.nii", ReadOptions(nan_to_air=True), integer=True)


def test_row_26_overflow_of_the_scaling_is_infinite(plain: Path) -> None:
    write_nifti(plain, np.full(GRID.shape, 1e300), AXIAL)
    with pytest.raises(InputError, match="720 voxels are NaN or infinite"):
        read_image(patched(plain, (112, "2f", (3e38, 0.0))))


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_row_27_volume_k_of_four_dimensions(tmp_path: Path, suffix: str) -> None:
    series = np.concatenate([ct(seed=k) for k in range(3)])
    path = tmp_path / f"a.{suffix}"
    write_nifti(path, series, AXIAL)
    data = bytearray(gzip.decompress(path.read_bytes()) if suffix == "nii.gz" else path.read_bytes())
    struct.pack_into("<5h", data, 40, 4, 10, 9, 8, 3)
    path.write_bytes(gzip.compress(bytes(data)) if suffix == "nii.gz" else data)
    single = tmp_path / "single.nii"
    for k in range(3):
        write_nifti(single, ct(seed=k), AXIAL)
        assert np.array_equal(read_image(path, ReadOptions(volume=k)).array, read_image(single).array)
    with pytest.raises(InputError, match=r"this file holds 3; say which with --volume K \(0 to 2\)"):
        read_image(path)
    with pytest.raises(InputError, match="no volume 3; the file holds 3 volumes, numbered 0 to 2"):
        read_image(path, ReadOptions(volume=3))
    struct.pack_into("<8h", data, 40, 5, 10, 9, 8, 1, 3, 1, 1)
    path.write_bytes(gzip.compress(bytes(data)) if suffix == "nii.gz" else data)
    with pytest.raises(InputError, match="one three-dimensional volume"):
        read_image(path, ReadOptions(volume=0))


def test_row_27_volume_of_a_three_dimensional_file(plain: Path) -> None:
    assert np.array_equal(read_image(plain, ReadOptions(volume=0)).array, ct())
    for k in (1, -1):
        with pytest.raises(InputError, match=f"no volume {k}; the file holds one volume"):
            read_image(plain, ReadOptions(volume=k))
    one = patched(plain, (40, "5h", (4, 10, 9, 8, 1)))
    assert np.array_equal(read_image(one).array, ct())


@pytest.mark.parametrize(
    ("codes", "expected_x"), [((1, 2), -30.0), ((1, 0), -40.25), ((0, 1), -30.0)], ids=["both", "qform", "sform"]
)
def test_row_28_sform_wins_over_qform(plain: Path, codes: tuple[int, int], expected_x: float) -> None:
    """The rule: sform if its code is above 0, else qform. The origins differ by 10 mm to the left."""
    sform = np.array(raw_header(plain)["sform"])
    sform[3] = 30.0  # R = 30 mm, so L = -30 mm
    volume = read_image(patched(plain, (252, "2h", codes), (280, "12f", tuple(sform))))
    assert volume.geometry.origin_mm[2] == pytest.approx(expected_x)
    assert any("disagree" in note for note in volume.notes) == (codes == (1, 2))


@pytest.mark.parametrize(("shear", "is_read"), [(4e-4, True), (3e-3, False), (0.3, False)])
def test_row_28_shear_up_to_a_thousandth(plain: Path, shear: float, is_read: bool) -> None:
    path = patched(plain, (252, "2h", (0, 1)), (284, "f", (0.75 * shear,)))
    if is_read:
        matrix = np.asarray(read_image(path).geometry.direction)
        assert np.abs(matrix.T @ matrix - np.eye(3)).max() < 1e-12
    else:
        with pytest.raises(InputError, match="fslorient"):
            read_image(path)


def test_row_28_pixdim_and_sform_of_other_sizes_are_refused(plain: Path) -> None:
    with pytest.raises(InputError, match=r"pixdim says a spacing of 0\.6 x 0\.75 x 2\.5 mm, the sform 0\.5 x"):
        read_image(patched(plain, (80, "f", (0.6,))))
    with pytest.raises(InputError, match="16 bits, not 32"):
        read_image(patched(plain, (72, "h", (32,))))


@pytest.mark.parametrize(("unit", "factor"), [(1, 1e-3), (2, 1.0), (3, 1e3), (0, 1.0)])
def test_row_30_units(plain: Path, unit: int, factor: float) -> None:
    sform = np.array(raw_header(plain)["sform"]) * factor
    spacing = tuple(factor * s for s in (0.5, 0.75, 2.5))
    path = patched(plain, (123, "B", (unit,)), (80, "3f", spacing), (252, "2h", (0, 1)), (280, "12f", tuple(sform)))
    assert read_image(path).geometry.is_close(GRID, tolerance_voxels=1e-3)


@pytest.mark.parametrize(
    ("suffix", "bad"),
    [(suffix, bad) for suffix in (".nii", ".mha") for bad in ("0", "-1.5", "nan")] + [(".nrrd", "0"), (".nrrd", "nan")],
)
def test_row_29_spacing_that_is_not_positive_is_refused(plain: Path, tmp_path: Path, suffix: str, bad: str) -> None:
    path = tmp_path / f"bad{suffix}"
    if suffix == ".nii":
        path = patched(plain, (80, "f", (float(bad),)))
    elif suffix == ".mha":
        write_mha(path, ct(), ElementSpacing=f"{bad} 1 1")
    else:  # a negative step of NRRD is a direction, not a spacing
        write_nrrd(path, ct(), **{"space directions": f"({bad},0,0) (0,1,0) (0,0,1)"})
    with pytest.raises(InputError, match=r"strictly positive|not a number|damaged header"):
        read_image(path)


@pytest.mark.parametrize(("spacing", "is_noted"), [(0.2, True), (0.3, False), (10.0, False), (15.0, True)])
def test_row_30_an_unusual_spacing_is_noted(tmp_path: Path, spacing: float, is_noted: bool) -> None:
    write_nifti(tmp_path / "a.nii", ct((20, 22, 30)), np.diag((-spacing, -spacing, 2.0, 1.0))[:3])
    assert [("unusual for CT" in note) for note in read_image(tmp_path / "a.nii").notes] == [True] * is_noted


@pytest.mark.parametrize(("shape", "is_noted"), [((4, 500, 501), True), ((30, 40, 50), True), ((20, 220, 300), False)])
def test_row_30_a_default_spacing_that_makes_no_chest_is_noted(tmp_path: Path, shape, is_noted: bool) -> None:
    write_nifti(tmp_path / "a.nii", ct(shape), np.diag((-1.0, -1.0, 1.0, 1.0))[:3])
    volume = read_image(tmp_path / "a.nii")
    assert [("default of a converter" in note) for note in volume.notes] == [True] * is_noted
    assert read_image(tmp_path / "a.nii", integer=False).geometry.spacing_mm == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("surplus", "is_read"), [(b"\0" * 64, True), (b"\n", True), (b"\1\2", False), (b"\0" * 300, False)]
)
def test_row_25_bytes_behind_the_voxels(plain: Path, tmp_path: Path, surplus: bytes, is_read: bool) -> None:
    """Padding of a writer, or the last voxels of a file into which bytes were put."""
    data = plain.read_bytes() + surplus
    plain.write_bytes(data)
    packed = tmp_path / "packed.nii.gz"
    packed.write_bytes(gzip.compress(data))
    for path in (plain, packed):
        if is_read:
            assert np.array_equal(read_image(path).array, ct())
        else:
            with pytest.raises(InputError, match="more bytes of voxels than its header declares"):
                read_image(path)


@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf")])
def test_row_32_unset_scaling_is_identity(plain: Path, slope: float) -> None:
    volume = read_image(patched(plain, (112, "2f", (slope, -3.0))))
    assert np.array_equal(volume.array, ct())
    assert volume.notes == ("the header's scaling is 0 or not a number: values were taken as they are",)
    assert read_image(patched(plain, (112, "2f", (0.0, 0.0)))).notes == ()  # what nifti1.h calls unscaled


@pytest.mark.parametrize("padding", [-2000, -2048, -3024])
@pytest.mark.parametrize("write", [write_nrrd, write_mha])
def test_row_14_padding_is_no_loss(tmp_path: Path, padding: int, write) -> None:
    array = ct((20, 30, 30))
    array[:, :10] = padding
    volume = read_image(write(tmp_path / f"a.{write.__name__[6:]}", array))
    assert (volume.array[:, :10] == -1024).all()
    assert volume.status == ()
    (note,) = volume.notes
    assert note.startswith("33 % of voxels lay below -1024 HU (padding)")


def test_row_15_values_that_wrapped_round_are_flagged(tmp_path: Path) -> None:
    """Soft tissue of 12-bit data that was read as signed: 20 % of the voxels lie around -4000."""
    array = ct((20, 30, 30)).astype(np.int32)
    array[:, :6] -= 4096
    volume = read_image(write_nrrd(tmp_path / "a.nrrd", array))
    assert volume.status == ("clipped",)
    assert any("20 % of the voxels outside padding lay outside" in note for note in volume.notes)
    array = ct((20, 30, 30)).astype(np.int32)
    array[:, :6] += 70000
    assert read_image(write_nrrd(tmp_path / "a.nrrd", array)).status == ("clipped",)


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_row_35_empty_and_one_voxel_masks(tmp_path: Path, suffix: str) -> None:
    write = {"nrrd": write_nrrd, "mha": write_mha}.get(suffix)
    for count in (0, 1):
        labels = np.zeros(GRID.shape, np.uint8)
        labels.ravel()[:count] = 1
        path = tmp_path / f"m.{suffix}"
        write(path, labels) if write else write_nifti(path, labels, AXIAL)
        volume = read_image(path, integer=True)
        assert volume.array.sum() == count
        assert volume.array.dtype == np.uint8
        write_image(tmp_path / "out.nii.gz", volume.array, volume.geometry)
        assert read_image(tmp_path / "out.nii.gz", integer=True).array.sum() == count
    single = write_nifti(tmp_path / "one.nii", np.ones((1, 1, 1), np.uint8), AXIAL) or tmp_path / "one.nii"
    assert read_image(single, integer=True).array.shape == (1, 1, 1)


AWKWARD_NAMES = [
    "two words",
    " leading and trailing ",
    "na\u00efve",
    "nai\u0308ve",
    "\U0001fac1 lung",
    "l" * 200,
    "-rf",
    "100%s of %d %n",
    'o\'brien "x"',
    "line\nbreak",
    "..a..b..",
    "$HOME;`x`&*?[a]",
]


@pytest.mark.parametrize("name", AWKWARD_NAMES, ids=range(len(AWKWARD_NAMES)))
def test_row_36_awkward_file_names(tmp_path: Path, name: str) -> None:
    array = ct()
    write_nrrd(tmp_path / f"{name}.nrrd", array)
    write_mha(tmp_path / f"{name}.mha", array)
    for suffix in ("nrrd", "mha"):
        assert np.array_equal(read_image(tmp_path / f"{name}.{suffix}").array, array)
    out = tmp_path / f"{name}.nii.gz"
    write_image(out, array, GRID)
    assert np.array_equal(read_image(out).array, array)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.{s}" for s in ("nrrd", "mha", "nii.gz"))


def test_row_36_awkward_file_names_in_the_c_locale(tmp_path: Path) -> None:
    write_image(tmp_path / "\U0001fac1 na\u00efve %s.nii.gz", ct(), GRID)
    code = (
        "import sys, pathlib; from lungseg.scan.nifti import read_image, write_image\n"
        "folder = pathlib.Path(sys.argv[1]); (path,) = folder.iterdir()\n"
        "v = read_image(path); write_image(path.with_name('x' + path.name), v.array, v.geometry)"
    )
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env)
    first, second = sorted(tmp_path.iterdir())
    assert first.read_bytes() == second.read_bytes()
