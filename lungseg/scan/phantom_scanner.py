"""The CT scanner of the digital phantom: reconstruction kernels, dose, slice profile, field of view and noise.

The resolution of a kernel is a modulation transfer function (MTF) in the slice plane: a Gaussian, for sharp kernels
minus a wider one, which lifts middle frequencies (edge enhancement). Noise of filtered back-projection has the power
spectrum ramp x MTF^2: little power at low frequency, and a peak that moves up with the sharpness of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage, sparse

from lungseg.scan.volume import Geometry


@dataclass(frozen=True)
class Kernel:
    """A reconstruction kernel."""

    name: str
    """What the DICOM header calls it: names of one vendor, soft to sharp."""
    width: float
    """Width of the point-spread function against the standard kernel."""
    edge: float
    """Strength of edge enhancement: share of a ``EDGE_WIDTH`` times wider Gaussian that is taken off."""
    noise: float
    """Standard deviation of the noise against the standard kernel at the same dose."""


KERNELS = {
    "soft": Kernel("B30f", 1.45, 0.0, 0.6),
    "standard": Kernel("B50f", 1.0, 0.0, 1.0),
    "sharp": Kernel("B70f", 0.62, 0.55, 2.0),
}
"""Widths and noise are our choice after published ratios of one scanner's kernels (B70f about three times the noise of
B30f); LAA-950 of one scan is known to differ by 7.7 points between kernels (METHOD 6)."""
EDGE_WIDTH = 2.6
DOSES = {"low": 0.25, "standard": 1.0, "high": 2.5}
"""Dose against a standard chest CT; the standard deviation of noise goes with one over its square root."""
REFERENCE_THICKNESS_MM = 2.0
"""Slice thickness that ``noise_hu`` of a phantom refers to: thinner slices hold fewer photons."""
RAMP_FLOOR = 0.02
"""Frequency in 1/mm added to the ramp: real spectra do not vanish at zero."""
SLICE_BLUR = 0.3
"""Standard deviation of the noise's correlation along z against the slice thickness: neighbours share projections
where slices overlap."""
AIR_NOISE = 0.35
"""Noise in air outside the body against the middle of it: rays through air keep their photons."""


def mtf(kernel: Kernel, frequency: np.ndarray, psf_mm: float) -> np.ndarray:
    """Modulation transfer function at frequencies in 1/mm; 1 at zero."""
    sigma = kernel.width * psf_mm
    narrow = np.exp(-2.0 * (np.pi * sigma * frequency) ** 2)
    wide = np.exp(-2.0 * (np.pi * EDGE_WIDTH * sigma * frequency) ** 2)
    result: np.ndarray = (1.0 + kernel.edge) * narrow - kernel.edge * wide
    return result


def blur(hu: np.ndarray, spacing_mm: tuple[float, float, float], kernel: Kernel, psf_mm: float) -> np.ndarray:
    """Point-spread function of a kernel applied to the scene, in place where possible; float32."""
    sigma = kernel.width * psf_mm
    if sigma <= 0:
        return hu
    y, x = (sigma / s for s in spacing_mm[1:])
    hu = ndimage.gaussian_filter(hu, (0.6 * psf_mm / spacing_mm[0], y, x), output=hu, truncate=3.0)
    if kernel.edge > 0:
        more = float(np.sqrt(EDGE_WIDTH**2 - 1.0))
        wide = ndimage.gaussian_filter(hu, (0.0, more * y, more * x), truncate=3.0)
        hu *= 1.0 + kernel.edge
        wide *= kernel.edge
        hu -= wide
    return hu


def ct_noise(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    *,
    rng: np.random.Generator,
    kernel: Kernel = KERNELS["standard"],
    psf_mm: float = 0.6,
    thickness_mm: float | None = None,
) -> np.ndarray:
    """Noise of filtered back-projection: ramp x MTF in the plane, nearly independent between slices.

    Parameters
    ----------
    shape, spacing_mm
        Grid (z, y, x) in voxels and mm.
    rng
        Source of the noise.
    kernel, psf_mm
        Kernel, and the standard deviation in mm of the standard kernel's point-spread function.
    thickness_mm
        Slice thickness; slices that overlap are correlated. Default: the slice distance.

    Returns
    -------
    float32 array of ``shape``, mean 0, standard deviation 1.
    """
    noise = rng.standard_normal(shape, dtype=np.float32)
    along_y = np.fft.fftfreq(shape[1], spacing_mm[1])[:, None]
    along_x = np.fft.rfftfreq(shape[2], spacing_mm[2])[None, :]
    frequency = np.hypot(along_y, along_x)
    response = (np.sqrt(frequency + RAMP_FLOOR) * mtf(kernel, frequency, psf_mm)).astype(np.float32)
    for k in range(shape[0]):
        noise[k] = fft.irfft2(fft.rfft2(noise[k]) * response, s=shape[1:])
    thickness = spacing_mm[0] if thickness_mm is None else thickness_mm
    noise = ndimage.gaussian_filter1d(noise, SLICE_BLUR * thickness / spacing_mm[0], axis=0, truncate=3.0)
    noise /= max(float(noise.std()), 1e-6)
    return noise


def noise_sd(noise_hu: float, kernel: Kernel, dose: str, thickness_mm: float) -> float:
    """Standard deviation in HU in the middle of the body for a kernel, a dose and a slice thickness."""
    return noise_hu * kernel.noise / float(np.sqrt(DOSES[dose] * thickness_mm / REFERENCE_THICKNESS_MM))


def noise_map(body_hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Noise against the middle of the body, ``AIR_NOISE`` to 1: more where rays cross more tissue."""
    density = np.clip(body_hu, -1000.0, 0.0) / np.float32(1000.0) + np.float32(1.0)
    depth = ndimage.gaussian_filter(density, 12.0 / np.asarray(spacing_mm), truncate=2.0)
    result: np.ndarray = AIR_NOISE + (1.0 - AIR_NOISE) * depth
    return result


def slice_profile(array: np.ndarray, factor: int, thickness: float) -> np.ndarray:
    """Mean over slices ``thickness`` output slices thick, whose centres are ``factor`` fine slices apart.

    Parameters
    ----------
    array : (Z * factor, Y, X)
    thickness : float
        Slice thickness over slice distance: 1 touches, above 1 overlaps, below 1 leaves gaps.

    Returns
    -------
    float32 (Z, Y, X).
    """
    num_out, rest = array.shape[0] // factor, array.shape[1:]
    if abs(thickness - 1.0) < 1e-6:
        return array.reshape(num_out, factor, *rest).mean(axis=1, dtype=np.float32) if factor > 1 else array
    centre = (np.arange(num_out) + 0.5) * factor
    low, high = (np.clip(centre + sign * 0.5 * thickness * factor, 0.0, array.shape[0]) for sign in (-1.0, 1.0))
    fine = np.arange(array.shape[0])
    overlap = np.minimum(high[:, None], fine + 1.0) - np.maximum(low[:, None], fine)
    weights = sparse.csr_matrix(np.clip(overlap / (high - low)[:, None], 0.0, None).astype(np.float32))
    averaged: np.ndarray = (weights @ array.reshape(array.shape[0], -1)).reshape(num_out, *rest)
    return averaged


def outside_circle(geometry: Geometry) -> np.ndarray:
    """Pixels outside the circle of reconstruction that touches the far edges of a slice; bool (Y, X)."""
    y, x = (
        (np.arange(n) - 0.5 * (n - 1)) * s for n, s in zip(geometry.shape[1:], geometry.spacing_mm[1:], strict=True)
    )
    radius = 0.5 * max(geometry.extent_mm[1:])
    outside: np.ndarray = y[:, None] ** 2 + x[None, :] ** 2 > radius**2
    return outside
