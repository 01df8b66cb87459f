"""The HU detector: real and simulated chests are accepted whatever is done to them, shifted and scaled ones named."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from lungseg.errors import InputError
from lungseg.scan.hu import HuTally, check_hu, to_hu
from lungseg.scan.hu_model import explain, find_piles
from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom

PHANTOMS = {
    "healthy": PhantomSpec(spacing_mm=(3.0, 2.0, 2.0)),
    "severe": PhantomSpec(spacing_mm=(3.0, 2.0, 2.0), severity="severe", diseases=DISEASES),
    "noisy thick": PhantomSpec(spacing_mm=(5.0, 1.5, 1.5), noise_hu=80.0),
}
ALL = [*PHANTOMS, "lungs of the severe one"]


@cache
def phantom(name: str) -> np.ndarray:
    if name not in PHANTOMS:
        made = make_phantom(PHANTOMS["severe"], seed=2)
        box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(made.lungs))
        return made.volume_hu[box]
    return make_phantom(PHANTOMS[name], seed=2).volume_hu


@cache
def real(folder: Path) -> dict[str, np.ndarray]:
    """Sparse copies of the public chest CTs, float or integer as stored (padding included)."""
    found = {}
    for name in ("cip-small/ct-64.nrrd", "elastix-emphysema/ct.mha", "cip-small/crop_ct_2slices.nrrd"):
        found[name] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name)))
    found["ibsi"] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "ibsi/ct_phantom/image/phantom.nii.gz")))
    for name, step in (("covid-p002/dicom", 12), ("lidc0001-slab/dicom", 3)):
        files = sorted((folder / name).iterdir())[::step]
        found[name] = np.concatenate([sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in files])[:, ::2, ::2]
    return {name: np.ascontiguousarray(a.astype(np.float64)) for name, a in found.items()}


def judge(values: np.ndarray) -> str:
    """What the reader says: the message of a refusal, else its notes."""
    out, tally = np.empty(values.shape, np.int16), HuTally()
    for k, plane in enumerate(values):
        to_hu(plane, out[k], tally)
    try:
        return "; ".join(check_hu(out, tally))
    except InputError as error:
        return f"REFUSED {error}"


def named_offset(message: str) -> int | None:
    found = re.search(r"shifted by (?:about )?([+-]\d+)", message)
    return int(found[1]) if found else None


def shifts(count: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(s) for s in rng.choice([-1, 1], count) * rng.uniform(200, 2000, count)]


def alterations(hu: np.ndarray) -> dict[str, np.ndarray]:
    """What scanners, protocols and people do to a scan without making it less of a CT."""
    rng = np.random.default_rng(0)
    clean = np.maximum(hu, -1024)
    padded, metal = clean.copy(), clean.copy()
    padded[:, : int(0.7 * hu.shape[1])] = -3024
    metal[:, : hu.shape[1] // 20, : hu.shape[2] // 3] = 3071
    ramp = ndimage.gaussian_filter1d(np.where(np.arange(hu.shape[2]) < hu.shape[2] // 4, -3024.0, clean), 2.0, axis=2)
    return {
        "sharp kernel": clean + rng.normal(0, 100, hu.shape),
        "soft and thick": ndimage.uniform_filter(clean, 3),
        "most of it padding": padded,
        "padding, interpolated": ramp,
        "metal": metal,
        "clipped at -1000": clean.clip(-1000, 400),
        "low kV, contrast": np.where((clean > 20) & (clean < 60), clean + 40, clean),
        "shifted by 30": clean + 30,
        "steps of 4": np.round(clean / 4) * 4,
        "steps of 16": np.round(clean / 16) * 16,
        "8 bits and a slope": np.round((clean.clip(-1024, 426) + 1024) / 5.686) * 5.686 - 1024,
        "noisy padding": np.where(hu < -1500, hu + rng.normal(0, 60, hu.shape), clean),
    }


@pytest.mark.parametrize("name", ALL)
def test_row_31_phantoms_are_accepted_whatever_is_done_to_them(name: str) -> None:
    hu = phantom(name).astype(float)
    assert judge(hu) == ""
    for what, values in alterations(hu).items():
        said = judge(values)
        assert said == "" or said.endswith("clipped at the source"), (what, said)


def test_row_31_real_scans_are_accepted_whatever_is_done_to_them(shared_data: Path) -> None:
    for name, hu in real(shared_data).items():
        for what, values in {"as it is": hu, **alterations(hu)}.items():
            said = judge(values)
            assert said == "" or said.endswith("clipped at the source"), (name, what, said)


@pytest.mark.parametrize("name", ALL)
def test_row_31_the_offset_is_named(name: str) -> None:
    for shift in (1024, -1024, 1000, 32768, *shifts(6, seed=len(name))):
        said = judge(phantom(name).astype(np.int32) + shift)
        offset = named_offset(said)
        assert said.startswith("REFUSED"), (shift, said)
        if shift < 32768 - 3071:  # what 16 bits cannot hold any more is refused without a name
            assert offset is not None, said
            assert abs(offset - shift) <= 60, said


@pytest.mark.slow
def test_row_31_of_200_shifted_scans_all_are_refused_and_the_offset_is_named(shared_data: Path) -> None:
    bases = [*real(shared_data).values(), *(phantom(name) for name in ALL)]
    for i, shift in enumerate(shifts(200, seed=7)):
        said = judge(bases[i % len(bases)] + shift)
        offset = named_offset(said)
        assert said.startswith("REFUSED"), (i % len(bases), shift, said)
        assert offset is not None, (i % len(bases), shift, said)
        assert abs(offset - shift) <= 60, (i % len(bases), shift, said)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 10.0])
def test_row_31_the_factor_is_named(name: str, factor: float) -> None:
    said = judge(phantom(name) * factor)
    assert said.startswith(f"REFUSED the values look multiplied by about {factor:g}. Divide by"), said


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("factor", [0.5, 2.0, 10.0])
def test_row_31_a_wrong_slope_is_named(name: str, factor: float) -> None:
    said = judge((phantom(name) + 1024.0) * factor - 1024)
    assert said.startswith(f"REFUSED the values look multiplied by about {factor:g} before the rescale intercept"), said


@pytest.mark.parametrize("name", ALL)
def test_row_31_inverted_contrast_is_named(name: str) -> None:
    for values in (-phantom(name).astype(np.int32), 3071 - phantom(name).astype(np.int32)):
        said = judge(values)
        assert said.startswith("REFUSED"), said
        assert "inverted" in said or name not in PHANTOMS, said  # lungs alone may look shifted as well


@pytest.mark.parametrize("name", ALL)
def test_row_31_swapped_bytes_are_refused(name: str) -> None:
    said = judge(phantom(name).astype(np.int16).byteswap())
    assert said.startswith("REFUSED"), said


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("top", "phrase"), [(255, "windowed to 0-255"), (1, "normalised to 0-1"), (100, "not HU"), (65535, "not HU")]
)
def test_row_31_windowed_pictures_are_refused(name: str, top: int, phrase: str) -> None:
    for low, high in ((-1024, 400), (-160, 240)):
        picture = ((phantom(name) - float(low)) / (high - low)).clip(0, 1) * top
        said = judge(picture)
        assert said.startswith("REFUSED"), said
        assert phrase in said or "multiplied" in said or "shifted" in said, said


def test_row_31_mr_images_are_refused_without_a_false_name(shared_data: Path) -> None:
    for name in ("brain1", "brain2", "breast1"):
        path = shared_data / "pyradiomics-baseline" / f"{name}_image.nrrd"
        said = judge(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
        assert said.startswith("REFUSED the values are not HU"), said


def test_row_31_small_and_ambiguous_offsets_are_left_or_noted() -> None:
    for shift in (-140, -60, 60, 140):
        said = judge(phantom("healthy").astype(np.int32) + shift)
        assert not said.startswith("REFUSED"), (shift, said)


def test_row_31_a_small_lung_in_deep_expiration_is_not_refused(shared_data: Path) -> None:
    """Lung at -600 instead of -850: nearest to this comes a scan of half the values."""
    hu = real(shared_data)["cip-small/crop_ct_2slices.nrrd"]
    for rise in (150, 300, 400):
        said = judge(np.where(hu < -500, hu + rise * np.exp(-(((hu + 850) / 150) ** 2)), hu))
        assert not said.startswith("REFUSED"), (rise, said)


def test_piles_of_hu_in_steps() -> None:
    counts = np.zeros(4000, int)
    counts[1000:3000:16] = 300  # every value of tissue stands alone
    counts[[0, 1000]] = 2000, 9000
    assert np.flatnonzero(find_piles(counts)).tolist() == [0, 1000]


def test_piles_are_padding_and_bounds_but_not_tissue() -> None:
    counts = np.zeros(2000, int)
    counts[100], counts[500:700], counts[1024] = 5000, 100, 3000
    assert np.flatnonzero(find_piles(counts)).tolist() == [100, 1024]
    assert explain(np.arange(5), np.zeros(5, int)) is None


def test_the_judgement_does_not_depend_on_the_order_of_voxels() -> None:
    hu = phantom("healthy")
    mixed = np.random.default_rng(0).permutation(hu.ravel()).reshape(hu.shape)
    for shift in (0, 500):
        assert judge(hu + shift) == judge(mixed + shift)
