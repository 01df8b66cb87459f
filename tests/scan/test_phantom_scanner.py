"""The scanner of the digital phantom: power spectra of its noise, kernels, slices and field of view."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.scan.phantom_scanner import (
    DOSES,
    KERNELS,
    blur,
    ct_noise,
    mtf,
    noise_map,
    noise_sd,
    outside_circle,
    slice_profile,
)
from lungseg.scan.volume import Geometry

SPACING = (2.0, 0.6, 0.6)


def radial_spectrum(noise: np.ndarray, pixel_mm: float, edges: np.ndarray) -> np.ndarray:
    """Noise power in rings of spatial frequency (1/mm), mean over slices."""
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(axis=0)
    frequency = np.hypot(np.fft.fftfreq(noise.shape[1], pixel_mm)[:, None], np.fft.fftfreq(noise.shape[2], pixel_mm))
    ring = np.digitize(frequency, edges)
    return np.array([power[ring == i].mean() for i in range(1, len(edges))])


@pytest.fixture(scope="module")
def spectra() -> dict[str, np.ndarray]:
    edges = np.linspace(0.0, 0.8, 17)
    return {
        name: radial_spectrum(
            ct_noise((12, 128, 128), SPACING, rng=np.random.default_rng(1), kernel=kernel), 0.6, edges
        )
        for name, kernel in KERNELS.items()
    }


def test_noise_is_standardised() -> None:
    for kernel in KERNELS.values():
        noise = ct_noise((10, 41, 40), (2.0, 0.7, 0.7), rng=np.random.default_rng(0), kernel=kernel)
        assert noise.dtype == np.float32
        assert noise.shape == (10, 41, 40)
        assert noise.std() == pytest.approx(1.0, abs=1e-4)
        assert abs(noise.mean()) < 0.05


def test_spectrum_rises_from_low_frequency_and_falls(spectra: dict[str, np.ndarray]) -> None:
    for name, power in spectra.items():
        peak = int(power.argmax())
        assert power[0] < 0.6 * power[peak], name  # ramp
        assert power[-1] < 0.5 * power[peak], name  # MTF


def test_peak_of_the_spectrum_moves_up_with_sharpness(spectra: dict[str, np.ndarray]) -> None:
    centres = np.linspace(0.025, 0.775, 16)
    mean = [float((centres * spectra[name]).sum() / spectra[name].sum()) for name in ("soft", "standard", "sharp")]
    assert mean[0] * 1.15 < mean[1] < mean[2] / 1.25
    assert spectra["soft"].argmax() < spectra["sharp"].argmax()


def test_spectrum_is_ramp_times_mtf_squared(spectra: dict[str, np.ndarray]) -> None:
    frequency = np.linspace(0.025, 0.775, 16)
    for name, power in spectra.items():
        expected = (frequency + 0.02) * mtf(KERNELS[name], frequency, 0.6) ** 2
        keep = expected > 0.05 * expected.max()
        ratio = power[keep] / power[keep].mean() / (expected[keep] / expected[keep].mean())
        assert np.abs(ratio - 1.0).max() < 0.25, name


def test_overlapping_slices_share_noise() -> None:
    apart, overlapping = (
        ct_noise((20, 40, 40), SPACING, rng=np.random.default_rng(2), thickness_mm=mm) for mm in (2.0, 4.0)
    )
    close = [float(np.corrcoef(n[1:].ravel(), n[:-1].ravel())[0, 1]) for n in (apart, overlapping)]
    assert close[0] < 0.15
    assert 0.35 < close[1] < 0.65


def test_kernels_differ_as_their_names_say() -> None:
    frequency = np.linspace(0.0, 0.8, 9)
    curves = {name: mtf(kernel, frequency, 0.6) for name, kernel in KERNELS.items()}
    for curve in curves.values():
        assert curve[0] == pytest.approx(1.0)
    assert (curves["soft"][1:] < curves["standard"][1:]).all()
    assert (curves["standard"][1:] < curves["sharp"][1:]).all()
    assert curves["sharp"].max() > 1.05  # edge enhancement
    names = [KERNELS[name].name for name in ("soft", "standard", "sharp")]
    assert names == sorted(names)


def test_edges_overshoot_with_the_sharp_kernel_only() -> None:
    edge = np.full((3, 60, 60), -800.0, dtype=np.float32)
    edge[:, :, 30:] = 40.0
    for name, kernel in KERNELS.items():
        seen = blur(edge.copy(), SPACING, kernel, 0.6)
        assert (seen.max() > 60.0) == (name == "sharp")
        assert seen[:, 10:-10, :10].mean() == pytest.approx(-800.0, abs=1.0)
    assert blur(edge, SPACING, KERNELS["soft"], 0.0) is edge


def test_noise_goes_with_one_over_the_root_of_photons() -> None:
    standard = noise_sd(30.0, KERNELS["standard"], "standard", 2.0)
    assert standard == pytest.approx(30.0)
    for dose, share in DOSES.items():
        assert noise_sd(30.0, KERNELS["standard"], dose, 2.0) == pytest.approx(standard / np.sqrt(share))
    assert noise_sd(30.0, KERNELS["standard"], "standard", 8.0) == pytest.approx(standard / 2.0)
    body = np.full((4, 60, 60), -1000.0, dtype=np.float32)
    body[:, 15:45, 15:45] = 40.0
    shown = noise_map(body, (2.0, 2.0, 2.0))
    assert shown[2, 30, 30] > 0.8 > 0.5 > shown[2, 2, 2] > 0.3


@pytest.mark.parametrize(
    ("thickness", "expected"), [(1.0, [0.5, 2.5, 4.5]), (2.0, [1.0, 2.5, 4.0]), (0.5, [0.5, 2.5, 4.5])]
)
def test_slice_profile_by_hand(thickness: float, expected: list[float]) -> None:
    ramp = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None], (6, 2, 2)).copy()
    np.testing.assert_allclose(slice_profile(ramp, 2, thickness)[:, 0, 1], expected, rtol=1e-6)


def test_thick_slices_spread_a_thin_sheet_and_keep_its_mass() -> None:
    sheet = np.zeros((24, 1, 1), dtype=np.float32)
    sheet[11] = 6.0
    for thickness in (1.0, 2.0, 3.0):
        seen = slice_profile(sheet, 2, thickness).ravel()
        assert seen.sum() == pytest.approx(3.0)
        assert (seen > 0).sum() == round(thickness)


def test_circle_touches_the_far_edges() -> None:
    outside = outside_circle(Geometry((2, 40, 60), (1.0, 1.0, 1.0)))
    assert not outside[20, 0]
    assert not outside[0, 30]
    assert outside[0, 0]
    assert 0.0 < outside.mean() < 0.3
