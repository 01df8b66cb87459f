"""Haralick's fourteen statistics of symmetric co-occurrence matrices, many matrices at once, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = (
    "glcm_asm",
    "glcm_contrast",
    "glcm_correlation",
    "glcm_variance",
    "glcm_idm",
    "glcm_sum_average",
    "glcm_sum_variance",
    "glcm_sum_entropy",
    "glcm_entropy",
    "glcm_difference_variance",
    "glcm_difference_entropy",
    "glcm_imc1",
    "glcm_imc2",
    "glcm_mcc",
)
"""Columns of ``haralick`` in Haralick's order: f1 (angular second moment) to f14 (maximal correlation)."""
DISSIMILARITY = "glcm_dissimilarity"
"""Name of the last column with ``mcc=False``."""
SUM_AVERAGE = NAMES.index("glcm_sum_average")
"""The one column that depends on where the grey levels begin."""

_SQUARINGS_AT_ONCE, _MAX_SQUARINGS = 5, 20
"""Squarings between two looks at the convergence, and at most. After k of them a component of relative eigenvalue r is
damped to r^(2^k), so that 20 leave an error of the eigenvalue below 4e-7 of it however close the next one lies."""
_PURITY = 1.0 - 1e-5
"""tr(P^2) / tr(P)^2 of a power P at which its columns are the eigenvector sought: the rest, squared, is the error."""


def haralick(counts: Tensor, *, mcc: bool) -> Tensor:
    """The fourteen statistics of each matrix of pair counts; levels are numbered from 0 here.

    Parameters
    ----------
    counts : float64 tensor, shape (M, L, L)
        Symmetric, not negative.
    mcc : bool
        False puts the dissimilarity, mean |i - j|, in place of the maximal correlation coefficient.

    Returns
    -------
    float64 tensor, shape (M, 14)
        Columns ``NAMES``; entropies in bits. A single level has correlation 1, MCC 1, IMC 0 and entropies 0. An empty
        matrix gives finite numbers without a meaning.

    Source
    ------
    METHOD 1.3, item 1; Haralick et al., IEEE SMC 1973; IBSI chapter 3.6.
    """
    size = counts.shape[-1]
    p = counts / counts.sum((1, 2), keepdim=True).clamp(min=1.0)
    marginal = p.sum(2)
    level = torch.arange(size, dtype=p.dtype, device=p.device)
    mean = marginal @ level
    variance = (marginal * (level - mean[:, None]).square()).sum(1)
    p_sum, p_diff = _diagonal_sums(p)
    contrast = p_diff @ level.square()
    mean_difference = p_diff @ level
    sums = torch.arange(2 * size - 1, dtype=p.dtype, device=p.device)
    flat = variance == 0
    # var(i - j) = contrast = 2 var - 2 cov for a symmetric matrix, hence correlation = cov / var = 1 - contrast / 2 var
    correlation = 1.0 - contrast / (2.0 * torch.where(flat, 1.0, variance))
    joint_entropy = _entropy_bits(p.flatten(1))
    marginal_entropy = _entropy_bits(marginal)
    # For a symmetric matrix HXY1 = HXY2 = 2 HX; >= 0 up to rounding
    mutual_information = (2.0 * marginal_entropy - joint_entropy).clamp(min=0.0)
    return torch.stack(
        (
            p.square().sum((1, 2)),
            contrast,
            torch.where(flat, 1.0, correlation),
            variance,
            p_diff @ (1.0 / (1.0 + level.square())),
            2.0 * mean,
            (p_sum * (sums - 2.0 * mean[:, None]).square()).sum(1),
            _entropy_bits(p_sum),
            joint_entropy,
            (p_diff * (level - mean_difference[:, None]).square()).sum(1),
            _entropy_bits(p_diff),
            torch.where(flat, 0.0, -mutual_information / torch.where(flat, 1.0, marginal_entropy)),
            (-torch.expm1(-2.0 * mutual_information)).sqrt(),
            _maximal_correlation(p, marginal) if mcc else mean_difference,
        ),
        1,
    )


def _diagonal_sums(p: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of i + j = 0..2L-2 and of |i - j| = 0..L-1 of symmetric matrices (M, L, L)."""
    num, size, _ = p.shape
    padded = torch.nn.functional.pad(p, (0, size))  # (M, L, 2L)
    per_matrix = 2 * size * size
    # Read with rows one element shorter, each row starts one column further right than the one above: columns are the
    # antidiagonals. With rows one longer it starts further left: the first L columns are the diagonals j - i >= 0.
    sums = padded.as_strided((num, size, 2 * size - 1), (per_matrix, 2 * size - 1, 1)).sum(1)
    differences = padded.as_strided((num, size, size), (per_matrix, 2 * size + 1, 1)).sum(1)
    differences[:, 1:] *= 2.0
    return sums, differences


def _entropy_bits(p: Tensor) -> Tensor:
    """Entropy in bits over the last axis; 0 log 0 = 0."""
    return torch.special.entr(p).sum(-1) / math.log(2.0)


def _maximal_correlation(p: Tensor, marginal: Tensor) -> Tensor:
    """Maximal correlation coefficient of (M, L, L) symmetric matrices; 1 for a single level.

    Q = D^-1 P D^-1 P is similar to S^2 with the symmetric S = D^-1/2 P D^-1/2, whose eigenvalue 1 has the known
    eigenvector sqrt(marginal). Taken off, the root of Q's second eigenvalue is the largest |eigenvalue| that is left.
    """
    present = marginal > 0
    root = marginal.sqrt()
    scale = torch.where(present, 1.0 / torch.where(present, root, 1.0), 0.0)
    deflated = scale[:, :, None] * p * scale[:, None, :] - root[:, :, None] * root[:, None, :]
    # LAPACK takes CPU matrices one by one, and is the faster there; on CUDA its kind would be the whole cost
    radius = spectral_radius(deflated) if p.is_cuda else torch.linalg.eigvalsh(deflated).abs().amax(1)
    return torch.where(present.sum(1) > 1, radius.clamp(max=1.0), 1.0)


def spectral_radius(matrices: Tensor) -> Tensor:
    """Largest |eigenvalue| of symmetric matrices (M, L, L), float64; (M,), within 1e-6 of it.

    The square of each is squared again and again until one eigenvector is left of it, v; the result is |S v|, whose
    error is of second order in that of v. All of it is products of many matrices at once, which suits a CUDA device.
    """
    scale = matrices.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    powers = matrices / scale[:, None, None]  # small ones must not vanish when squared
    powers = powers @ powers
    result = torch.zeros(len(matrices), dtype=matrices.dtype, device=matrices.device)
    rows = torch.arange(len(matrices), device=matrices.device)
    for _ in range(0, _MAX_SQUARINGS, _SQUARINGS_AT_ONCE):
        if rows.numel() == 0:
            break
        for _ in range(_SQUARINGS_AT_ONCE):
            trace = powers.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
            powers = powers / trace[:, None, None]
            powers = powers @ powers
        diagonal = powers.diagonal(dim1=1, dim2=2)  # of P^2 with tr P = 1, so that its trace is the purity of P
        column = diagonal.argmax(1)[:, None, None].expand(-1, powers.shape[1], 1)
        vector = powers.gather(2, column)[:, :, 0]
        vector = vector / vector.square().sum(1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        result[rows] = torch.bmm(matrices[rows], vector[:, :, None])[:, :, 0].square().sum(1).sqrt()
        rest = diagonal.sum(1) < _PURITY
        rows, powers = rows[rest], powers[rest]
    return result
