"""Reading artefacts: HDF5 files are untrusted input; only the schema gets through, and damage is told from bugs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny_store import volume_datasets, volume_provenance

from lungseg.errors import LungsegError, MismatchError, StoreError
from lungseg.store import reader
from lungseg.store.reader import Artefact, ReaderPool
from lungseg.store.schema import FORMAT_VERSION, fingerprint, write_artefact


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound volume.h5."""
    content = volume_datasets()
    write_artefact(tmp_path / "volume.h5", "volume", content, provenance=volume_provenance("c", content))
    return tmp_path / "volume.h5"


def refuse(path: Path, phrase: str, error: type[LungsegError] = StoreError, exit_code: int = 6) -> None:
    with pytest.raises(error, match=phrase) as caught:
        Artefact(path, "volume")
    assert caught.value.exit_code == exit_code
    assert str(path) in str(caught.value)


def keep(data: bytes, size: int) -> bytes:
    return data[:size]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage" * 1000,
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"\x00" * len(data),
        lambda data: b"\x00" * 512 + data[512:],
    ],
    ids=["empty", "garbage", "half", "last-byte", "head", "zeros", "no-superblock"],
)
def test_row_38_truncated_file(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    refuse(path, r"not a readable HDF5 file .*; delete it and run its stage again")


def test_row_38_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "volume.h5", "is missing")


def test_row_38_folder_instead_of_a_file(tmp_path: Path) -> None:
    refuse(tmp_path, "not a readable HDF5 file")


def test_row_38_other_hdf5_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        file["image"] = np.zeros((2, 2, 2))
    refuse(tmp_path / "volume.h5", "not a file of a lungseg store")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "abc", 1.5])
def test_row_39_other_format_version(path: Path, version: object) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = version
    refuse(path, f"this lungseg reads {FORMAT_VERSION}", MismatchError, 4)


def test_row_39_other_kind(path: Path) -> None:
    with pytest.raises(MismatchError, match="is a 'volume' file, not 'labels'"):
        Artefact(path, "labels")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("provenance", np.bytes_(b"{")),
        ("provenance", np.bytes_(b"[]")),
        ("provenance", np.bytes_(b"{}")),
        ("provenance", None),
        ("provenance", np.zeros(3)),
        ("provenance", '{"inputs":{}}'),  # of variable length: HDF5 can loop for ever over a damaged heap of those
        ("fingerprint", None),
    ],
)
def test_row_38_damaged_header(path: Path, name: str, value: object) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    refuse(path, "is damaged .*; delete it and run its stage again")


def replace(file: h5py.File, name: str, **keywords: object) -> None:
    del file[name]
    file.create_dataset(name, **keywords)


def external_link(file: h5py.File, folder: Path) -> None:
    del file["mask"]
    file["mask"] = h5py.ExternalLink(str(folder / "other.h5"), "/mask")


def external_group(file: h5py.File, folder: Path) -> None:
    del file["patches"]
    file["patches"] = h5py.ExternalLink(str(folder / "other.h5"), "/patches")


def soft_link(file: h5py.File, folder: Path) -> None:
    del file["mask"]
    file["mask"] = h5py.SoftLink("/source/mask")


def virtual(file: h5py.File, folder: Path) -> None:
    del file["image"]
    layout = h5py.VirtualLayout((4, 4, 4), "int16")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "image", (4, 4, 4))
    file.create_virtual_dataset("image", layout)


def external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(b"\x01" * 128)
    replace(file, "image", shape=(4, 4, 4), dtype="int16", external=[(str(folder / "secret"), 0, 128)])


def bomb(file: h5py.File, folder: Path) -> None:
    replace(file, "image", shape=(2**13, 2**13, 2**13), dtype="int16", chunks=(64, 64, 64), compression="gzip")


def hole(file: h5py.File, folder: Path) -> None:
    """Within the largest size, but nothing of it is stored."""
    replace(file, "image", shape=(1000, 1000, 1000), dtype="int16", chunks=(64, 64, 64))


def huge_chunk(file: h5py.File, folder: Path) -> None:
    replace(file, "image", shape=(512, 512, 512), dtype="int16", chunks=(512, 512, 512), compression="gzip")


def wrong_dtype(file: h5py.File, folder: Path) -> None:
    replace(file, "image", data=np.zeros((4, 4, 4), "float64"))


def big_endian(file: h5py.File, folder: Path) -> None:
    replace(file, "image", data=np.zeros((4, 4, 4), ">i2"))


def wrong_rank(file: h5py.File, folder: Path) -> None:
    replace(file, "image", data=np.zeros((4, 4), "int16"))


def compound(file: h5py.File, folder: Path) -> None:
    replace(file, "mask", data=np.zeros(3, [("a", "u1")]))


def text(file: h5py.File, folder: Path) -> None:
    replace(file, "mask", data="mask")


def null_space(file: h5py.File, folder: Path) -> None:
    replace(file, "mask", data=h5py.Empty("uint8"))


def unknown_dataset(file: h5py.File, folder: Path) -> None:
    file["patient"] = np.zeros(3)


def unknown_group(file: h5py.File, folder: Path) -> None:
    file.create_group("more")


def group_for_dataset(file: h5py.File, folder: Path) -> None:
    del file["mask"]
    file.create_group("mask")


def named_type(file: h5py.File, folder: Path) -> None:
    file["type"] = np.dtype("int16")


def loop(file: h5py.File, folder: Path) -> None:
    file["source/source"] = file["/"]


def missing(file: h5py.File, folder: Path) -> None:
    del file["patches/corner"]


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (external_link, "'mask' is a link to elsewhere; refused"),
        (external_group, "'patches' is a link to elsewhere; refused"),
        (soft_link, "'mask' is a link to elsewhere; refused"),
        (virtual, "'image' keeps its data elsewhere; refused"),
        (external_storage, "'image' keeps its data elsewhere; refused"),
        (bomb, "'image' declares 1099511627776 bytes with 0 stored; refused"),
        (hole, "'image' declares 2000000000 bytes with 0 stored; refused"),
        (huge_chunk, "'image' declares .* refused"),
        (wrong_dtype, "'image' is float64 of rank 3, expected int16 of 3"),
        (big_endian, "'image' is >i2 of rank 3"),
        (wrong_rank, "'image' is int16 of rank 2"),
        (compound, "'mask' is"),
        (text, "'mask' is object"),
        (null_space, "'mask'|damaged"),
        (unknown_dataset, "unexpected object 'patient'"),
        (unknown_group, "unexpected group 'more'"),
        (group_for_dataset, "unexpected group 'mask'"),
        (named_type, "unexpected object 'type'"),
        (loop, "unexpected group 'source/source'"),
        (missing, "patches/corner missing"),
    ],
)
def test_row_44_only_the_schema_gets_through(
    path: Path, tmp_path: Path, change: Callable[[h5py.File, Path], None], phrase: str
) -> None:
    """Security point 4: nothing outside the file is opened and nothing is allocated before it is checked."""
    with h5py.File(path, "r+") as file:
        change(file, tmp_path)
    refuse(path, phrase)


def test_a_constant_volume_is_no_bomb(tmp_path: Path) -> None:
    """deflate's best ratio must pass: air only, at the size of a chunk and beyond."""
    image = np.zeros((64, 256, 256), np.int16)
    content = {**volume_datasets(), "image": image, "mask": np.zeros(image.shape, np.uint8)}
    content = {name: array for name, array in content.items() if not name.startswith("source")}
    write_artefact(tmp_path / "volume.h5", "volume", content, provenance={"inputs": {}})
    with Artefact(tmp_path / "volume.h5", "volume") as artefact:
        assert not artefact.read("image").any()


def chunk_span(path: Path, name: str) -> tuple[int, int]:
    with h5py.File(path) as file:
        info = file[name].id.get_chunk_info(0)
        return info.byte_offset, info.size


@pytest.mark.parametrize("name", ["image", "mask", "patches/corner", "patches/mask_fraction"])
def test_row_43_flipped_bit_is_detected(path: Path, name: str) -> None:
    start, size = chunk_span(path, name)
    data = bytearray(path.read_bytes())
    data[start + size // 2] ^= 0x10
    path.write_bytes(data)
    with Artefact(path, "volume") as artefact:
        with pytest.raises(
            StoreError, match=f"{name} is damaged .*; delete the file and run its stage again"
        ) as caught:
            artefact.read(name)
        assert caught.value.exit_code == 6
        other = "mask" if name == "image" else "image"
        assert artefact.read(other).size


def chunk_bytes(path: Path) -> np.ndarray:
    """Which bytes of a file lie in chunks; the others are headers."""
    inside = np.zeros(path.stat().st_size, bool)
    with h5py.File(path) as file:
        for name in ("image", "mask", "patches/corner", "patches/mask_fraction"):
            for number in range(file[name].id.get_num_chunks()):
                info = file[name].id.get_chunk_info(number)
                inside[info.byte_offset : info.byte_offset + info.size] = True
    return inside


@pytest.mark.parametrize("where", ["chunks", "headers"])
def test_row_38_43_any_damaged_byte_is_refused_or_harmless(path: Path, where: str) -> None:
    """No hang, no crash, no other error, and no wrong value: HDF5 checks what it reads in a file of ours."""
    sound, inside = path.read_bytes(), chunk_bytes(path)
    rng = np.random.default_rng(1)
    refused = 0
    for place in rng.choice(np.flatnonzero(inside == (where == "chunks")), size=150, replace=False):
        data = bytearray(sound)
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            with Artefact(path, "volume") as artefact:
                content = {name: artefact.read(name) for name in artefact.names()}
                assert fingerprint("volume", artefact.provenance, content) == artefact.fingerprint
        except StoreError:
            refused += 1
    assert refused == 150 if where == "chunks" else 75 < refused < 150  # some bytes of the headers are unused


def test_hyperslabs(path: Path) -> None:
    whole = volume_datasets()["image"]
    with Artefact(path, "volume") as artefact:
        box = (slice(3, 9), slice(0, 5), slice(30, 36))
        np.testing.assert_array_equal(artefact.read("image", box), whole[box])
        assert artefact.read("image", box).flags.c_contiguous


def test_row_41_reads_without_a_file_lock(path: Path) -> None:
    """A writer's lock (or a file system without locks) does not stop readers."""
    import fcntl

    with open(path, "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with Artefact(path, "volume") as artefact:
            assert artefact.names()[0] == "image"


def test_failed_open_leaves_no_handle(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["patient"] = 1
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refuse(path, "unexpected object")
    assert len(os.listdir("/proc/self/fd")) == before


def test_pool_gives_one_handle_and_closes_the_oldest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 2)
    paths = [path.with_name(f"{i}.h5") for i in range(3)]
    for copy in paths:
        copy.write_bytes(path.read_bytes())
    pool = ReaderPool()
    first = pool.get(paths[0], "volume")
    assert pool.get(paths[0], "volume") is first
    second = pool.get(paths[1], "volume")
    pool.get(paths[0], "volume")
    pool.get(paths[2], "volume")  # the second one was used longest ago
    assert not second._file
    assert first._file
    assert pool.get(paths[1], "volume") is not second


def test_row_42_pool_is_empty_after_pickling_and_in_another_process(path: Path) -> None:
    pool = ReaderPool()
    mine = pool.get(path, "volume")
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.get(path, "volume") is not mine

    def child(queue: multiprocessing.SimpleQueue) -> None:
        other = pool.get(path, "volume")
        queue.put((other is not mine, int(other.read("image").sum())))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get() == (True, int(mine.read("image").sum()))
    process.join()
    assert pool.get(path, "volume") is mine
