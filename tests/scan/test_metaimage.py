"""MetaImage: compressed or not, one file or two, against SimpleITK, and every header that would be guessed refused."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import GRID, ct, write_mha

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError, ResourceError
from lungseg.scan.nifti import read_image


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_compressed_data(tmp_path: Path, pack) -> None:
    array = ct((30, 31, 32))
    path = write_mha(tmp_path / "a.mha", array, pack(array.tobytes()), CompressedData="True")
    assert np.array_equal(read_image(path).array, array)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "b.mha"), True)
    assert np.array_equal(read_image(tmp_path / "b.mha").array, array)


def test_types_and_byte_order(tmp_path: Path) -> None:
    array = ct()
    for dtype in (np.int16, np.int32, np.float32):
        assert np.array_equal(read_image(write_mha(tmp_path / "a.mha", array.astype(dtype))).array, array)
    path = write_mha(tmp_path / "b.mha", array, array.astype(">i2").tobytes(), BinaryDataByteOrderMSB="True")
    assert np.array_equal(read_image(path).array, array)
    labels = (array > 0).astype(np.uint8)
    path = write_mha(tmp_path / "c.mha", labels, BinaryDataByteOrderMSB=None)
    assert np.array_equal(read_image(path, integer=True).array, labels)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["scan.mhd", "50% of it.mhd"])
def test_header_and_voxels_in_two_files(tmp_path: Path, name: str, compressed: bool) -> None:
    array = ct()
    data = zlib.compress(array.tobytes()) if compressed else array.tobytes()
    raw = tmp_path / name.replace(".mhd", ".zraw" if compressed else ".raw")
    raw.write_bytes(data)
    path = write_mha(tmp_path / name, array, b"", ElementDataFile=raw.name, CompressedData=str(compressed))
    volume = read_image(path)
    assert np.array_equal(volume.array, array)
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-6)
    raw.write_bytes(data[:-1])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_image(path)
    raw.unlink()
    with pytest.raises(InputError, match="file of its voxels cannot be read"):
        read_image(path)


def test_direction_equals_simpleitk(tmp_path: Path) -> None:
    array = ct()
    array[1, 2, 3] = 2000
    matrix = "0 0.6 0.8 -1 0 0 0 -0.8 0.6"
    path = write_mha(tmp_path / "a.mha", array, TransformMatrix=None, Offset=None, Rotation=matrix, Position="1 2 3")
    volume = read_image(path)
    found = volume.geometry.to_world(np.argwhere(volume.array == 2000)[0])[::-1]
    image = sitk.ReadImage(str(path))
    assert np.allclose(found, image.TransformContinuousIndexToPhysicalPoint([3.0, 2.0, 1.0]), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"ElementSpacing": None}, "ElementSpacing has 0 numbers where 3"),
        ({"ElementSpacing": "1 1"}, "ElementSpacing has 2 numbers"),
        ({"ElementSpacing": "1 0 1"}, "strictly positive"),
        ({"ElementSpacing": "1 -1 1"}, "strictly positive"),
        ({"ElementSpacing": "1 nan 1"}, "damaged header"),
        ({"ElementSpacing": "0.001 0.001 0.001"}, "not plausible"),
        ({"TransformMatrix": None}, "TransformMatrix has 0 numbers where 9"),
        ({"TransformMatrix": "1 0.3 0 0 1 0 0 0 1"}, "right angles"),
        ({"TransformMatrix": "0 0 0 0 0 0 0 0 0"}, "strictly positive"),
        ({"Offset": "1 2"}, "origin of 2 numbers"),
        ({"BinaryDataByteOrderMSB": None}, "binarydatabyteordermsb"),
        ({"BinaryData": "False"}, "written as text"),
        ({"CompressedData": "perhaps"}, "compresseddata"),
        ({"HeaderSize": "12"}, "HeaderSize"),
        ({"ElementToIntensityFunctionSlope": "2"}, "to be rescaled"),
        ({"DistanceUnits": "m"}, "units are m"),
        ({"ElementType": "MET_STRING"}, "type 'MET_STRING'"),
        ({"ElementType": None}, "type"),
        ({"ElementNumberOfChannels": "3"}, "3 channels"),
        ({"NDims": "2"}, "2 dimensions, 3 sizes"),
        ({"NDims": "2", "DimSize": "10 72"}, "three-dimensional"),
        ({"DimSize": "10 9 0"}, "three-dimensional"),
        ({"DimSize": "10 9 8.5"}, "DimSize"),
        ({"DimSize": "10 9 1e9"}, "voxels along one axis"),
        ({"DimSize": None}, "no MetaImage"),
        ({"ElementDataFile": None}, "does not end|no MetaImage|damaged"),
        ({"Position": "1 2 3"}, "there twice"),
    ],
)
def test_row_25_29_30_headers_that_would_be_guessed_are_refused(tmp_path: Path, changes, phrase: str) -> None:
    path = write_mha(tmp_path / "a.mha", ct(), **changes)
    if "ElementDataFile" in changes:
        path.write_bytes(path.read_bytes().replace(b"ElementDataFile = LOCAL\n", b""))
    with pytest.raises(InputError, match=phrase) as caught:
        read_image(path)
    assert "a.mha" in str(caught.value)


def test_orientation_that_contradicts_itself_is_noted(tmp_path: Path) -> None:
    """SimpleITK writes the name of the orientation that it takes from the matrix: ours must agree with all of them."""
    image = sitk.GetImageFromArray(ct())
    for matrix in (
        (1, 0, 0, 0, 1, 0, 0, 0, 1),
        (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        (0, 0, 1, 1, 0, 0, 0, 1, 0),
        (1, 0, 0, 0, 0, 1, 0, -1, 0),
    ):
        image.SetDirection(matrix)
        image.SetSpacing((0.5, 0.75, 2.5))
        sitk.WriteImage(image, str(tmp_path / "a.mha"))
        assert read_image(tmp_path / "a.mha").notes == ()
    (note,) = read_image(write_mha(tmp_path / "b.mha", ct(), AnatomicalOrientation="LAI")).notes
    assert "calls its orientation LAI, its matrix says RAI" in note


def test_tags_that_say_the_same_twice_are_read(tmp_path: Path) -> None:
    """Old writers give both names of the byte order."""
    array = ct()
    path = write_mha(tmp_path / "a.mha", array, ElementByteOrderMSB="False", Origin="-40.25 12.5 -310")
    assert np.array_equal(read_image(path).array, array)
    with pytest.raises(InputError, match="binarydatabyteordermsb is there twice, with different values"):
        read_image(write_mha(tmp_path / "b.mha", array, ElementByteOrderMSB="True"))


def test_row_25_truncated_and_surplus_data(tmp_path: Path) -> None:
    array = ct((20, 20, 20))
    packed = zlib.compress(array.tobytes())
    for data in (packed[:-2], packed[: len(packed) // 2], b"rubbish" * 50):
        with pytest.raises(InputError, match="truncated or damaged"):
            read_image(write_mha(tmp_path / "a.mha", array, data, CompressedData="True"))
    with pytest.raises(InputError, match="truncated or damaged"):
        read_image(write_mha(tmp_path / "a.mha", array, array.tobytes()[:-1]))
    with pytest.raises(InputError, match="more bytes of voxels than its header"):
        read_image(write_mha(tmp_path / "a.mha", array, DimSize="20 19 20"))


def test_absurd_sizes_are_refused_before_allocation(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="60000 x 60000 x 60000"):
        read_image(write_mha(tmp_path / "a.mha", ct(), DimSize="60000 60000 60000"))


def test_row_27_a_volume_of_four_dimensions(tmp_path: Path) -> None:
    series = np.stack([ct(seed=k) for k in range(2)])
    path = write_mha(tmp_path / "a.mha", series, zlib.compress(series.tobytes()), CompressedData="True")
    for k in range(2):
        assert np.array_equal(read_image(path, ReadOptions(volume=k)).array, series[k])
    with pytest.raises(InputError, match="no volume 2; the file holds 2 volumes"):
        read_image(path, ReadOptions(volume=2))
    mixed = write_mha(tmp_path / "b.mha", series, TransformMatrix="1 0 0 1 0 1 0 0 0 0 1 0 0 0 0 1")
    with pytest.raises(InputError, match="mixes space and time"):
        read_image(mixed, ReadOptions(volume=0))
