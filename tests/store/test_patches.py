"""The patch table and the loader: image i of a run is the same patch, whoever reads it."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_store import PATCH, add_case, make_store, volume_datasets, volume_provenance

from lungseg.errors import InputError, UsageError
from lungseg.scan.volume import AIR_HU
from lungseg.store.patches import PatchSource, grid_corners, mask_fractions, patch_table, read_box
from lungseg.store.schema import write_artefact

TRIPLES = st.tuples(*[st.integers(1, 9)] * 3)
SHAPES = st.tuples(*[st.integers(1, 14)] * 3)


@given(shape=SHAPES, size=TRIPLES, stride=TRIPLES)
@settings(max_examples=60, deadline=None)
def test_grid_covers_the_volume_from_inside(
    shape: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    corners = grid_corners(shape, size, stride)
    assert corners.dtype == np.int32
    assert len(np.unique(corners, axis=0)) == len(corners)
    np.testing.assert_array_equal(corners, corners[np.lexsort(corners.T[::-1])])  # z, then y, then x
    for axis in range(3):
        starts = np.unique(corners[:, axis])
        assert starts[0] == 0
        assert starts[-1] == max(shape[axis] - size[axis], 0)
        assert np.all(np.diff(starts) <= stride[axis])
    covered = np.zeros(shape, bool)
    for z, y, x in corners:
        covered[z : z + size[0], y : y + size[1], x : x + size[2]] = True
    assert covered.all() or any(step > edge for step, edge in zip(stride, size, strict=True))


MASKS = hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 2))


@given(mask=MASKS, size=TRIPLES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_mask_fractions_equal_brute_force(mask: np.ndarray, size: tuple[int, ...], data: st.DataObject) -> None:
    corners = data.draw(hnp.arrays(np.int32, (5, 3), elements=st.integers(0, 16)))
    fractions = mask_fractions(mask, corners, size)
    assert fractions.dtype == np.float32
    for (z, y, x), fraction in zip(corners, fractions, strict=True):
        inside = mask[z : z + size[0], y : y + size[1], x : x + size[2]] > 0
        assert fraction == np.float32(inside.sum() / np.prod(size))


def test_mask_fractions_need_one_table_of_four_bytes_a_voxel() -> None:
    mask = np.ones((80, 90, 100), np.uint8)
    corners = grid_corners(mask.shape, (16, 16, 16), (16, 16, 16))
    tracemalloc.start()
    try:
        fractions = mask_fractions(mask, corners, (16, 16, 16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.all(fractions == 1)
    assert peak < 5 * mask.size


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_mask_fractions_of_volumes_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    """From 2^31 voxels on the table has 64 bits; one voxel less still fits 32."""
    mask = (np.random.default_rng(0).random((12, 13, 14)) < 0.5).astype(dtype)
    corners, size = grid_corners(mask.shape, (5, 6, 7), (2, 3, 4)), (5, 6, 7)
    made: list[np.dtype] = []
    zeros = np.zeros

    def watched(shape: object, dtype: type) -> np.ndarray:
        made.append(np.dtype(dtype))
        return zeros(shape, dtype)  # type: ignore[call-overload]

    monkeypatch.setattr(np, "zeros", watched)
    expected = mask_fractions(mask, corners, size)
    assert made[0] == np.int32
    monkeypatch.setattr("lungseg.store.patches.INT32_VOXELS", mask.size)
    np.testing.assert_array_equal(mask_fractions(mask, corners, size), expected)
    assert made[2] == np.int64


@given(mask=MASKS, size=TRIPLES, stride=TRIPLES, least=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_patch_table_lists_what_has_enough_lung(
    mask: np.ndarray, size: tuple[int, ...], stride: tuple[int, ...], least: float
) -> None:
    corners, fractions = patch_table(mask, size=size, stride=stride, min_fraction=least)
    every = grid_corners(mask.shape, size, stride)
    share = mask_fractions(mask, every, size)
    np.testing.assert_array_equal(fractions, mask_fractions(mask, corners, size))
    good = (share >= least) & (share > 0)
    if good.any():
        np.testing.assert_array_equal(corners, every[good])
    elif share.any():  # the fullest one alone
        assert len(corners) == 1
        assert fractions[0] == share.max()
    else:
        assert corners.shape == (0, 3)
        assert fractions.shape == (0,)
    assert corners.dtype == np.int32
    assert fractions.dtype == np.float32


def test_row_45_patch_larger_than_the_volume() -> None:
    mask = np.ones((4, 5, 6), np.uint8)
    corners, fractions = patch_table(mask, size=(8, 8, 8), stride=(4, 4, 4), min_fraction=0.5)
    np.testing.assert_array_equal(corners, [[0, 0, 0]])
    assert fractions[0] == np.float32(4 * 5 * 6 / 512)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_read_box_equals_a_padded_array(data: st.DataObject) -> None:
    array = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    corner = data.draw(st.tuples(*[st.integers(-12, 12)] * 3))
    size = data.draw(TRIPLES)
    padded = np.pad(array, 24, constant_values=-7)
    expected = padded[tuple(slice(24 + c, 24 + c + n) for c, n in zip(corner, size, strict=True))]
    np.testing.assert_array_equal(read_box(array, corner, size, -7), expected)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    store = make_store(tmp_path_factory.mktemp("store") / "cohort", cases=3)
    return [store.case_file(case_id, "volume") for case_id in store.case_ids()]


def source(
    volumes: list[Path], *, seed: int = 5, cache_bytes: int = 0, halo: int = 2, flips: bool = True
) -> PatchSource:
    return PatchSource(volumes, size=PATCH, halo=halo, seed=seed, flips=flips, cache_bytes=cache_bytes)


def digest(patches: PatchSource, index: int) -> str:
    patch = patches.read(index)
    return hashlib.sha256(
        patch.volume_hu.tobytes() + patch.mask.tobytes() + repr(patch.lung_median_hu).encode()
    ).hexdigest()


class Hashes:
    """A dataset for the loader: the digest of each image."""

    def __init__(self, patches: PatchSource) -> None:
        self.patches = patches

    def __getitem__(self, index: int) -> str:
        return digest(self.patches, index)

    def __len__(self) -> int:
        return 24


def test_image_depends_on_seed_and_index_alone(volumes: list[Path]) -> None:
    expected = [digest(source(volumes), index) for index in range(24)]
    assert len(set(expected)) == 24
    backwards = source(volumes)
    assert [digest(backwards, index) for index in reversed(range(24))] == expected[::-1]
    assert [digest(source(volumes, cache_bytes=2**30), index) for index in range(24)] == expected
    one = 3 * volume_datasets()["image"].size  # room for the first case that is read only
    some = source(volumes, cache_bytes=one)
    assert [digest(some, index) for index in range(24)] == expected
    assert len(some._cache) == 1
    copy = pickle.loads(pickle.dumps(some))
    assert not copy._cache
    assert [digest(copy, index) for index in range(24)] == expected
    assert not set(expected) & {digest(source(volumes, seed=6), index) for index in range(24)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("start", "cache_bytes"),
    [
        pytest.param("fork", 0, marks=pytest.mark.slow),
        ("fork", 2**30),
        pytest.param("spawn", 0, marks=pytest.mark.slow),
    ],
)
def test_row_42_loader_workers_read_the_same(volumes: list[Path], start: str, cache_bytes: int) -> None:
    """Handles are opened before the workers start; four of them must not share one."""
    from torch.utils.data import DataLoader

    patches = source(volumes, cache_bytes=cache_bytes)
    expected = [digest(patches, index) for index in range(24)]
    loader = DataLoader(Hashes(patches), batch_size=2, num_workers=4, multiprocessing_context=start, collate_fn=list)
    assert [value for batch in loader for value in batch] == expected
    assert [digest(patches, index) for index in range(24)] == expected


def test_patches_with_halo_and_flips(volumes: list[Path]) -> None:
    for index in range(10):
        patch = source(volumes).read(index)
        bare = source(volumes, halo=0).read(index)
        assert patch.volume_hu.shape == patch.mask.shape == (20, 20, 20)
        assert patch.volume_hu.dtype == np.int16
        assert patch.mask.dtype == bool
        assert patch.volume_hu.flags.c_contiguous
        inner = (slice(2, -2),) * 3
        np.testing.assert_array_equal(patch.volume_hu[inner], bare.volume_hu)
        np.testing.assert_array_equal(patch.mask[inner], bare.mask)
    assert patch.lung_median_hu == bare.lung_median_hu < -500


def coded_volume(tmp_path: Path, shape: tuple[int, int, int]) -> tuple[Path, np.ndarray]:
    """A volume whose values tell where they come from."""
    image = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    content = volume_datasets()
    content = {
        "image": image,
        "mask": np.ones(shape, np.uint8),
        "patches/corner": np.array([[8, 4, 4], [4, 8, 0]], np.int32),
        "patches/mask_fraction": np.ones(2, np.float32),
    }
    path = tmp_path / "volume.h5"
    write_artefact(path, "volume", content, provenance=volume_provenance("c", content))
    return path, content["patches/corner"]


def test_jitter_stays_near_the_listed_patch(tmp_path: Path) -> None:
    """Each axis moves by up to a quarter patch, so that at least (3/4)^3 of the listed patch is read."""
    shape = (20, 22, 24)
    path, listed = coded_volume(tmp_path, shape)
    patches = PatchSource([path], size=(8, 8, 8), halo=0, seed=1, flips=False, cache_bytes=0)
    offsets = []
    for index in range(200):
        patch = patches.read(index)
        inside = np.argwhere(patch.mask)[0]
        code = int(patch.volume_hu[tuple(inside)])
        corner = np.stack(np.unravel_index(code, shape)) - inside
        expected = read_box(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), corner, (8, 8, 8), AIR_HU)
        np.testing.assert_array_equal(patch.volume_hu, expected)
        np.testing.assert_array_equal(patch.mask, expected != AIR_HU)
        distance = corner - listed
        offsets.append(distance[np.abs(distance).max(axis=1).argmin()])
    offsets = np.asarray(offsets)
    assert np.abs(offsets).max() == 2
    for axis in range(3):
        assert set(offsets[:, axis]) == {-2, -1, 0, 1, 2}


def test_jittered_patches_still_hold_lung(volumes: list[Path]) -> None:
    patches = source(volumes, halo=0, cache_bytes=2**30)
    listed = volume_datasets()["patches/mask_fraction"]
    shares = np.array([patches.read(index).mask.mean() for index in range(200)])
    assert shares.min() > 0
    assert shares.mean() > 0.85 * listed.mean()


def test_flips_mirror_each_axis_half_of_the_time(tmp_path: Path) -> None:
    path, _ = coded_volume(tmp_path, (20, 22, 24))
    plain = PatchSource([path], size=(8, 8, 8), halo=0, seed=1, flips=False, cache_bytes=0)
    flipped = PatchSource([path], size=(8, 8, 8), halo=0, seed=1, flips=True, cache_bytes=0)
    seen = []
    for index in range(100):
        a, b = plain.read(index).volume_hu, flipped.read(index).volume_hu
        match = [f for f in np.ndindex(2, 2, 2) if np.array_equal(np.flip(a, np.flatnonzero(f)), b)]
        assert len(match) == 1
        seen.append(match[0])
    assert np.all(np.abs(np.mean(seen, axis=0) - 0.5) < 0.2)


def test_cases_are_drawn_equally_often(tmp_path: Path) -> None:
    """One case lists a single patch, the other many: both give about half of the images."""
    store = make_store(tmp_path / "cohort", cases=1)
    few = np.array([[0, 0, 0]], np.int32)
    other = add_case(
        store, "few", image=np.full((24, 40, 36), 123, np.int16),
        **{"patches/corner": few, "patches/mask_fraction": np.ones(1, np.float32)},
    )  # fmt: skip
    patches = source([store.case_file("case-0", "volume"), other], halo=0)
    assert len(patches) == 2
    share = np.mean([patches.read(index).lung_median_hu == 123 for index in range(200)])
    assert 0.4 < share < 0.6


def test_row_45_store_without_patches(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=1)
    none = {"patches/corner": np.zeros((0, 3), np.int32), "patches/mask_fraction": np.zeros(0, np.float32)}
    empty = add_case(store, "empty", **none)
    with pytest.raises(InputError, match="none of the 1 cases lists a training patch") as caught:
        source([empty])
    assert caught.value.exit_code == 3
    assert len(source([empty, store.case_file("case-0", "volume")])) == 1


def test_turned_patches_are_turned_in_the_axial_plane_alone(tmp_path: Path) -> None:
    """All eight positions of a square come up, equally often, and nothing else of the image changes."""
    path, _ = coded_volume(tmp_path, (20, 24, 24))

    def patches(flips: bool, turns: bool) -> PatchSource:
        return PatchSource([path], size=(4, 8, 8), halo=1, seed=1, flips=flips, turns=turns, cache_bytes=2**20)

    for flips, positions in ((False, 4), (True, 8)):
        seen = []
        for index in range(240):
            plain = patches(False, False).read(index)
            moved = patches(flips, True).read(index)
            views = [plain.volume_hu, plain.volume_hu[::-1]] if flips else [plain.volume_hu]
            matches = [
                (turn, mirrored)
                for view in views
                for turn in range(4)
                for mirrored in range(2 if flips else 1)
                if np.array_equal(np.rot90(view[:, ::-1] if mirrored else view, turn, axes=(1, 2)), moved.volume_hu)
            ]
            assert len(matches) == 1
            seen.append(matches[0])
            assert moved.volume_hu.flags.c_contiguous
        counts = np.unique(seen, axis=0, return_counts=True)[1]
        assert len(counts) == positions
        assert np.abs(counts - 240 / positions).max() < 5 * np.sqrt(240 / positions)


def test_patches_that_are_not_square_are_not_turned(volumes: list[Path]) -> None:
    with pytest.raises(UsageError, match="not square"):
        PatchSource(volumes, size=(8, 8, 16), halo=0, seed=1, flips=True, turns=True, cache_bytes=0)


def test_limits_are_those_of_the_whole_volume(tmp_path: Path) -> None:
    path, _ = coded_volume(tmp_path, (20, 24, 24))
    patches = PatchSource([path], size=(8, 8, 8), halo=0, seed=1, flips=True, limits=True, cache_bytes=0)
    assert {patches.read(i).limits_hu for i in range(5)} == {(0.0, 20.0 * 24 * 24 - 1)}
    without = PatchSource([path], size=(8, 8, 8), halo=0, seed=1, flips=True, cache_bytes=0)
    assert without.read(0).limits_hu is None
