"""The largest eigenvalue by repeated squaring, as CUDA devices take it, against LAPACK; sums along diagonals."""

from __future__ import annotations

import pytest
import torch

from lungseg.radiomics.haralick import NAMES, _diagonal_sums, haralick, spectral_radius


def _symmetric(num: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn((num, size, size), generator=generator, dtype=torch.float64)
    return matrices + matrices.mT


@pytest.mark.parametrize("size", [1, 2, 7, 24, 57])
@pytest.mark.parametrize("scale", [1e-9, 0.1, 1e9])
def test_spectral_radius_equals_lapack(size: int, scale: float) -> None:
    matrices = _symmetric(40, size, size) * scale
    expected = torch.linalg.eigvalsh(matrices).abs().amax(1)
    torch.testing.assert_close(spectral_radius(matrices), expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_spectral_radius_with_a_near_second(gap: float, sign: float) -> None:
    """However close the next eigenvalue lies (opposite signs too), the error stays below the gap."""
    basis = torch.linalg.qr(_symmetric(30, 20, 3))[0]
    values = torch.rand((30, 20), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.9
    values[:, 0], values[:, 1] = 1.0, sign * (1.0 - gap)
    matrices = basis @ torch.diag_embed(values) @ basis.mT
    found = spectral_radius((matrices + matrices.mT) / 2)
    torch.testing.assert_close(found, torch.ones(30, dtype=torch.float64), rtol=0.0, atol=2e-7)


def test_spectral_radius_of_nothing() -> None:
    assert spectral_radius(torch.zeros((2, 5, 5), dtype=torch.float64)).tolist() == [0.0, 0.0]
    assert spectral_radius(torch.zeros((0, 5, 5), dtype=torch.float64)).shape == (0,)


@pytest.mark.parametrize("size", [1, 2, 5, 57])
def test_diagonal_sums(size: int) -> None:
    matrices = _symmetric(3, size, 0).abs()
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    sums, differences = _diagonal_sums(matrices)
    for matrix, by_sum, by_difference in zip(matrices, sums, differences, strict=True):
        for k in range(2 * size - 1):
            torch.testing.assert_close(by_sum[k], matrix[i + j == k].sum())
        for k in range(size):
            torch.testing.assert_close(by_difference[k], matrix[(i - j).abs() == k].sum())


def test_empty_rows_and_columns_change_nothing() -> None:
    counts = torch.zeros((2, 9, 9), dtype=torch.float64)
    counts[:, 2:6, 2:6] = _symmetric(2, 4, 5).abs().round(decimals=1) * 10
    counts[1, 3] = counts[1, :, 3] = 0.0
    small, large = haralick(counts[:, 2:6, 2:6], mcc=True), haralick(counts, mcc=True)
    small[:, NAMES.index("glcm_sum_average")] += 4.0  # levels begin two higher
    torch.testing.assert_close(small, large, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_mcc_on_cuda_equals_lapack() -> None:
    counts = _symmetric(50, 30, 8).abs()
    column = NAMES.index("glcm_mcc")
    found = haralick(counts.cuda(), mcc=True)[:, column].cpu()
    torch.testing.assert_close(found, haralick(counts, mcc=True)[:, column], rtol=1e-6, atol=1e-6)
