"""NRRD: every encoding and space against SimpleITK, and every header that would have to be guessed refused."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import GRID, ct, write_nrrd

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError, ResourceError
from lungseg.scan.nifti import read_image


@pytest.mark.parametrize("encoding", ["raw", "gzip", "gz", "bzip2", "bz2"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    pack = {"g": gzip.compress, "b": bz2.compress, "r": bytes}[encoding[0]]
    array = ct()
    path = write_nrrd(tmp_path / "a.nrrd", array, pack(array.tobytes()), encoding=encoding)
    volume = read_image(path)
    assert np.array_equal(volume.array, array)
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-6)
    assert volume.notes == ()
    if encoding[0] != "b":  # SimpleITK is built without bzip2
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), array)


@pytest.mark.parametrize(
    ("space", "signs"), [("RAS", (-1, -1, 1)), ("left-anterior-superior", (1, -1, 1)), ("LPS", (1, 1, 1))]
)
def test_spaces_are_turned_to_ours(tmp_path: Path, space: str, signs: tuple[int, int, int]) -> None:
    """The same voxel lies at the same place for us and for SimpleITK, whatever the words for the axes are."""
    array = ct()
    array[1, 2, 3] = 2000
    path = write_nrrd(tmp_path / "a.nrrd", array, space=space, space_directions="(0,0.6,0.8) (-1,0,0) (0,-1.6,1.2)")
    volume = read_image(path)
    found = volume.geometry.to_world(np.argwhere(volume.array == 2000)[0])[::-1]  # (L, P, S)
    own = np.array([-40.25, 12.5, -310]) + 3 * np.array([0, 0.6, 0.8]) + 2 * np.array([-1, 0, 0]) + [0, -1.6, 1.2]
    assert np.allclose(found, own * signs, atol=1e-6)
    if space != "left-anterior-superior":
        image = sitk.ReadImage(str(path))
        assert np.allclose(found, image.TransformContinuousIndexToPhysicalPoint([3.0, 2.0, 1.0]), atol=1e-6)


def test_types_and_byte_order(tmp_path: Path) -> None:
    array = ct()
    for dtype in (np.int16, np.int32, np.float32):
        volume = read_image(write_nrrd(tmp_path / "a.nrrd", array.astype(dtype)))
        assert np.array_equal(volume.array, array)
    path = write_nrrd(tmp_path / "b.nrrd", array, array.astype(">i2").tobytes(), endian="big", type="signed short int")
    assert np.array_equal(read_image(path).array, array)
    labels = (array > 0).astype(np.uint8)
    path = write_nrrd(tmp_path / "c.nrrd", labels, endian=None)  # one byte needs no order
    assert np.array_equal(read_image(path, integer=True).array, labels)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"space": None}, "no anatomical space"),
        ({"space": "scanner-xyz"}, "space 'scanner-xyz'"),
        ({"space": "3D-right-handed"}, "left and right are unknown"),
        ({"space": None, "spacings": "0.5 0.75 2.5", "space directions": None}, "left and right are unknown"),
        ({"space directions": None}, "no `space directions`"),
        ({"space directions": "(0.5,0,0) (0,0.75,0)"}, "2 space directions for 3 axes"),
        ({"space directions": "(0.5,0,0) (0,0.75,0) (0,0,nan)"}, "no vector"),
        ({"space directions": "(0.5,0,0) (0,0.75,0) (0,0,0)"}, "strictly positive"),
        ({"space directions": "(0.5,0,0) (0,0.75,0) (0,0,0.09)"}, "not plausible"),
        ({"space directions": "(0.5,0,0) (0,0.75,0) (0,0.9,2.5)"}, "right angles"),
        ({"space directions": "none (0.5,0,0) (0,0.75,0)"}, "several values a voxel"),
        ({"space origin": "(1,2)"}, "no vector"),
        ({"space units": '"m" "m" "m"'}, "units are m, m, m"),
        ({"endian": None}, "byte order"),
        ({"encoding": "ascii"}, "encoding 'ascii' is not supported"),
        ({"encoding": "hex"}, "encoding 'hex' is not supported"),
        ({"encoding": None}, "no `encoding`"),
        ({"type": "block"}, "type 'block'"),
        ({"type": None}, "no `type`"),
        ({"sizes": "10 9"}, "dimension 3, sizes 10 9"),
        ({"sizes": "10 9 -8"}, "damaged header"),
        ({"sizes": "10 9 0"}, "three-dimensional"),
        ({"sizes": "99999999 9 8"}, "99999999 voxels along one axis"),
        ({"dimension": "2", "sizes": "10 72", "space directions": "(0.5,0,0) (0,0.75,0)"}, "three-dimensional"),
        ({"line skip": "3"}, "line skip"),
        ({"byte skip": "-1"}, "byte skip"),
        ({"datafile": "secret.raw"}, "in another file"),
    ],
)  # fmt: skip
def test_row_25_29_30_headers_that_would_be_guessed_are_refused(tmp_path: Path, changes, phrase: str) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ct(), **changes)
    with pytest.raises(InputError, match=phrase) as caught:
        read_image(path)
    assert "a.nrrd" in str(caught.value)


def test_row_25_repeated_and_unreadable_lines_are_refused(tmp_path: Path) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ct())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"encoding: raw\n", b"encoding: raw\nsizes: 10 9 8\n"))
    with pytest.raises(InputError, match="repeated line"):
        read_image(path)
    path.write_bytes(data.replace(b"encoding: raw\n", b"encoding: raw\nrubbish\n"))
    with pytest.raises(InputError, match="unreadable line"):
        read_image(path)
    path.write_bytes(data.split(b"\n\n")[0])
    with pytest.raises(InputError, match="does not end"):
        read_image(path)
    path.write_bytes(b"NRRD0009" + data[8:])
    with pytest.raises(InputError, match="no NRRD file"):
        read_image(path)


def test_key_value_pairs_comments_and_windows_lines_are_read_over(tmp_path: Path) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ct())
    head, data = path.read_bytes().split(b"\n\n", 1)
    head += b"\nPatientName:=x: y\nmeasurement frame: (1,0,0) (0,1,0) (0,0,1)"
    path.write_bytes(head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + data)
    volume = read_image(path)
    assert np.array_equal(volume.array, ct())
    assert volume.notes == ()


def test_a_missing_origin_is_noted(tmp_path: Path) -> None:
    volume = read_image(write_nrrd(tmp_path / "a.nrrd", ct(), space_origin=None))
    assert volume.geometry.origin_mm == (0.0, 0.0, 0.0)
    assert volume.notes == ("the header gives no origin: 0, 0, 0 was taken",)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
@pytest.mark.parametrize("kept", [0.4, -1])
def test_row_25_truncated_data_is_refused(tmp_path: Path, encoding: str, kept: float) -> None:
    array = ct((20, 20, 20))
    data = {"raw": bytes, "gzip": gzip.compress, "bzip2": bz2.compress}[encoding](array.tobytes())
    cut = data[: int(kept * len(data)) if kept > 0 else int(kept)]
    with pytest.raises(InputError, match="truncated or damaged"):
        read_image(write_nrrd(tmp_path / "a.nrrd", array, cut, encoding=encoding))


def test_row_25_more_data_than_declared_is_refused(tmp_path: Path) -> None:
    array = ct()
    with pytest.raises(InputError, match="more bytes of voxels than its header"):
        read_image(write_nrrd(tmp_path / "a.nrrd", array, sizes="10 9 7"))


def test_absurd_sizes_are_refused_before_allocation(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="60000 x 60000 x 60000"):
        read_image(write_nrrd(tmp_path / "a.nrrd", ct(), sizes="60000 60000 60000"))
    with pytest.raises(InputError, match="truncated or damaged: its header declares"):
        read_image(write_nrrd(tmp_path / "a.nrrd", ct(), gzip.compress(b"x"), sizes="900 900 900", encoding="gzip"))


def test_row_27_a_volume_of_four_dimensions(tmp_path: Path) -> None:
    series = np.stack([ct(seed=k) for k in range(3)])
    path = write_nrrd(tmp_path / "a.nrrd", series)
    with pytest.raises(InputError, match=r"holds 3; say which with --volume K \(0 to 2\)"):
        read_image(path)
    for k in range(3):
        assert np.array_equal(read_image(path, ReadOptions(volume=k)).array, series[k])
    with pytest.raises(InputError, match="no volume 3; the file holds 3 volumes, numbered 0 to 2"):
        read_image(path, ReadOptions(volume=3))
