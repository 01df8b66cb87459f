"""Every site of a lattice against its own window, cut out with its halo."""

from __future__ import annotations

import pytest
import torch

from lungseg.errors import InputError
from lungseg.radiomics import blocks, dense, windows
from lungseg.radiomics.dense import dense_descriptors, site_corners
from lungseg.radiomics.descriptor import FAMILIES, MIN_LUNG_VOXELS, compute_descriptors
from lungseg.radiomics.glcm import Aggregation
from lungseg.radiomics.windows import HALO_VOXELS

MEDIAN = -850.0


def _lung(shape: tuple[int, int, int] = (37, 61, 50), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """HU float32 of growing roughness, and a ragged mask that does not fill the volume."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn(shape, generator=generator) * torch.linspace(5, 200, shape[2]) - 800
    mask = torch.nn.functional.avg_pool3d(torch.randn((1, *shape), generator=generator), 7, 1, 3)[0] > -0.02
    mask[:8] = False
    mask[:, :9] = False
    mask[-1, -2:] = True
    return volume.clamp(-1100, 900).round(), mask


def _windows_at(
    volume: torch.Tensor, mask: torch.Tensor, corners: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows with their halo, from a volume with no lung around it."""
    pad = window + max(HALO_VOXELS)
    volume, mask = (torch.nn.functional.pad(array, (pad,) * 6) for array in (volume, mask))
    boxes = [
        tuple(slice(c + pad - h, c + pad + window + h) for c, h in zip(corner, HALO_VOXELS, strict=True))
        for corner in corners.tolist()
    ]
    return torch.stack([volume[box] for box in boxes]), torch.stack([mask[box] for box in boxes])


def _corners(shape: torch.Size, window: int, stride: int) -> torch.Tensor:
    axes = site_corners(shape, window=window, stride=stride)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


@pytest.mark.parametrize(
    ("window", "stride", "aggregation", "dtype"),
    [
        (8, 8, "merged", torch.float32), (16, 8, "merged", torch.float32), (32, 8, "merged", torch.float32),
        (8, 4, "merged", torch.float32), (16, 4, "mean", torch.float32), (32, 4, "merged", torch.float32),
        (24, 8, "mean", torch.float64), (12, 4, "merged", torch.float64), (15, 5, "merged", torch.int16),
    ],
)  # fmt: skip
def test_dense_equals_patch_mode(window: int, stride: int, aggregation: Aggregation, dtype: torch.dtype) -> None:
    volume, mask = _lung()
    volume = volume.to(dtype)
    described = dense_descriptors(
        volume, mask, lung_median_hu=MEDIAN, window=window, stride=stride, aggregation=aggregation
    )
    assert described.shape == (*(-(-n // stride) for n in volume.shape), 34)
    assert described.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    corners = _corners(volume.shape, window, stride)
    chosen = torch.randperm(len(corners), generator=torch.Generator().manual_seed(1))[:40]
    cut, masks = _windows_at(volume, mask, corners[chosen], window)
    expected = compute_descriptors(cut, masks, lung_median_hu=torch.tensor(MEDIAN), aggregation=aggregation, halo=True)
    found = described.flatten(0, 2)[chosen]
    assert found.isnan().any(1).tolist() == found.isnan().all(1).tolist() == expected.isnan().all(1).tolist()
    valid = ~expected.isnan().any(1)
    assert valid.sum() >= 10
    error = (found - expected)[valid].abs() / expected[valid].abs().clamp(min=1.0)
    assert error.max().item() < 1e-5
    if dtype == torch.float64:
        assert error.max().item() < 1e-10


def test_validity_follows_the_lung_of_the_window() -> None:
    """Single voxels, far from each other: no pair, no neighbourhood, valid from ten of them on."""
    volume, _ = _lung()
    mask = torch.zeros_like(volume, dtype=torch.bool)
    mask[::3, ::3, ::3] = True
    mask[:, 30:] = False
    described = dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=16, stride=8)
    corners = _corners(volume.shape, 16, 8)
    cut, masks = _windows_at(volume, mask, corners, 16)
    halo = tuple(slice(h, -h) for h in HALO_VOXELS)
    counts = masks[(slice(None), *halo)].flatten(1).sum(1)
    assert described.flatten(0, 2).isfinite().all(1).tolist() == (counts >= MIN_LUNG_VOXELS).tolist()
    expected = compute_descriptors(cut, masks, lung_median_hu=torch.tensor(MEDIAN), halo=True)
    torch.testing.assert_close(described.flatten(0, 2), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("aggregation", ["merged", "mean"])
def test_byte_budget_changes_nothing(aggregation: Aggregation) -> None:
    volume, mask = _lung((24, 40, 33))
    whole, pieces = (
        dense_descriptors(
            volume, mask, lung_median_hu=MEDIAN, window=16, stride=8, aggregation=aggregation, chunk_bytes=budget
        )
        for budget in (2**30, 1)
    )
    torch.testing.assert_close(whole, pieces, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("window", "aggregation"), [(16, "merged"), (16, "mean"), (32, "merged")])
def test_sums_of_pairs_stay_within_the_byte_budget(
    window: int, aggregation: Aggregation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrices of the layers of a window, unless it is the blocks of a single site that need more."""
    tiles: list[torch.Size] = []
    per_block: list[int] = []

    def spy(*given: object) -> tuple[blocks.Lattice, torch.Tensor, torch.Tensor]:
        part, running, middle = blocks.tile_of(*given)  # type: ignore[arg-type]
        tiles.append(running.shape[:2])
        per_block.append(running[0, 0].nbytes)
        return part, running, middle

    monkeypatch.setattr(dense, "tile_of", spy)
    volume, mask = _lung((24, 90, 110))
    volume[..., 20:] /= 4  # HU around -200: few levels are left out
    for budget in (2**22, 2**25, 2**28):
        tiles.clear()
        dense_descriptors(
            volume, mask, lung_median_hu=MEDIAN, window=window, stride=8, aggregation=aggregation, chunk_bytes=budget
        )
        layers = window // 8
        for rows, columns in tiles:
            smallest = rows == columns == layers
            assert smallest or rows * columns * (layers + 1) * per_block[0] <= budget
    assert len(tiles) <= (1 if aggregation == "merged" else 4)


@pytest.mark.parametrize("window", [8, 24])
def test_no_limit_on_what_is_worked_on_at_once_changes_nothing(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA; with a layer of blocks without lung amid the others, and a slab of sites that is one plane."""
    volume, mask = _lung((48, 40, 33))
    mask[16:40] = False
    expected = dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=window, stride=8)
    monkeypatch.setattr(windows, "CACHE_VOXELS", 2**62)
    monkeypatch.setattr(dense, "_SITES_AT_ONCE", 1)
    found = dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=window, stride=8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_sites_outside_the_volume_are_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, _ = _lung((16, 16, 16))
    described: list[int] = []
    original = dense._grouped_features

    def spy(counts: torch.Tensor, lowest: int, mcc: bool) -> torch.Tensor:
        described.append(len(counts))
        return original(counts, lowest, mcc)

    monkeypatch.setattr(dense, "_grouped_features", spy)
    dense_descriptors(volume, volume < 9e9, lung_median_hu=MEDIAN, window=32, stride=8)
    assert sum(described) == 8


def test_dissimilarity_takes_the_place_of_mcc() -> None:
    volume, mask = _lung((16, 24, 24))
    with_mcc, without = (
        dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=8, stride=8, mcc=mcc) for mcc in (True, False)
    )
    last = FAMILIES["glcm"].stop - 1
    others = [column for column in range(34) if column != last]
    torch.testing.assert_close(with_mcc[..., others], without[..., others], equal_nan=True)
    assert not torch.equal(with_mcc[..., last], without[..., last])


def test_windows_lie_around_the_centres_of_cells() -> None:
    z, y, x = site_corners((20, 16, 1), window=16, stride=8)
    assert z.tolist() == [-4, 4, 12]
    assert y.tolist() == [-4, 4]
    assert x.tolist() == [-4]


def test_no_lung_and_flat_lung() -> None:
    volume = torch.full((16, 16, 16), -850.0)
    empty = torch.zeros_like(volume, dtype=torch.bool)
    assert dense_descriptors(volume, empty, lung_median_hu=MEDIAN, window=8, stride=8).isnan().all()
    flat = dense_descriptors(volume, ~empty, lung_median_hu=MEDIAN, window=16, stride=8)
    assert flat.isfinite().all()
    assert flat[..., 1:4].abs().max().item() == 0.0
    assert flat[..., FAMILIES["gabor"]].abs().max().item() == 0.0


def test_bad_input_is_refused() -> None:
    volume, mask = _lung((16, 24, 24))
    for window, stride in ((12, 8), (8, 16), (16, 0), (14, 7)):
        with pytest.raises(InputError, match="multiple of the stride"):
            dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=window, stride=stride)
    with pytest.raises(InputError, match="aggregation"):
        dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=8, stride=8, aggregation="max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Z, Y, X"):
        dense_descriptors(volume, mask[:8], lung_median_hu=MEDIAN, window=8, stride=8)
    volume[12, 12, 12], mask[12, 12, 12] = torch.nan, False
    assert dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=24, stride=8)[1, 1, 1].isfinite().all()
    mask[12, 12, 12] = True
    with pytest.raises(InputError, match="NaN"):
        dense_descriptors(volume, mask, lung_median_hu=MEDIAN, window=8, stride=8)


@pytest.mark.gpu
def test_dense_on_cuda_equals_cpu() -> None:
    volume, mask = _lung()
    on_cpu, on_cuda = (
        dense_descriptors(volume.to(place), mask.to(place), lung_median_hu=MEDIAN, window=16, stride=8).cpu()
        for place in ("cpu", "cuda")
    )
    error = (on_cpu - on_cuda).abs() / on_cpu.abs().clamp(min=1.0)
    assert error.nan_to_num().max().item() <= 1e-4
