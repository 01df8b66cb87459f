"""Tokens of a lattice finer than the student's: passes over the shifted volume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from diffusion_fixture import tiny_student

import lungseg.segmentation.encoding as encoding
from lungseg.config.cluster import ClusterConfig
from lungseg.diffusion.tokens import NoiseField, embed, network_input, reflected
from lungseg.errors import UsageError
from lungseg.segmentation.encoding import encode_lung, encode_passes, lattice_cell
from lungseg.segmentation.lattice import pad_volume, token_mask_fraction

SHAPE = (18, 22, 27)
SEED = 5
TOKEN = 4


@pytest.fixture(scope="module")
def volume():
    rng = np.random.default_rng(0)
    hu = rng.integers(-1024, 200, SHAPE).astype(np.int16)
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:-1, 3:, 1:-2] = True
    return hu, mask


def _config(encoding="slabs", **values):
    return ClusterConfig(**{"encoding": encoding, "timesteps": (0,), "token_stride": 2, "seed": SEED, **values})


@pytest.mark.parametrize("encoding", ["slabs", "windows"])
@pytest.mark.parametrize("parity", [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_half_stride_equals_encoding_the_shifted_volume(volume, encoding, parity):
    # tokens of 4 around the centres of cells of 2 begin at 2 j - 1
    student = tiny_student()
    hu, mask = volume
    features, usable = encode_lung(hu, mask, student, _config(encoding))
    before = [3 if odd else 1 for odd in parity]
    widths = [(b, 0) for b in before]
    shifted = np.pad(hu, widths, mode="reflect"), np.pad(mask, widths)
    expected, _ = encode_lung(*shifted, student, _config(encoding, token_stride=None))
    expected = expected[:, *(slice(odd, None) for odd in parity)]
    own = tuple(slice(odd, None, 2) for odd in parity)
    where = usable[own]
    assert where.sum() > 20
    same = tuple(slice(0, n) for n in where.shape)
    np.testing.assert_allclose(features[:, *own][:, where], expected[:, *same][:, where], atol=1e-5)


def test_tokens_lie_around_their_cells_and_every_site_is_made_once(volume):
    student = tiny_student()
    hu, mask = volume
    made = np.zeros([-(-n // 2) for n in SHAPE], dtype=int)
    parts = list(encode_passes(hu, mask, student, _config()))
    assert len(parts) == 8
    for part in parts:
        made[part.sites] += 1
        assert part.features[0].size <= -(-made.size // 6)  # an eighth of the lattice, with its borders
    assert (made == 1).all()
    _, usable = encode_lung(hu, mask, student, _config())
    np.testing.assert_array_equal(usable, token_mask_fraction(mask, 2) > 0)


def test_the_noise_belongs_to_the_voxels(volume):
    student = tiny_student()
    hu, mask = volume
    t, plane = 20, (24, 28)  # the volume, widened to whole tokens
    features, usable = encode_lung(hu, mask, student, _config(timesteps=(t,)))
    image = pad_volume(np.pad(hu, [(1, 0)] * 3, mode="reflect"), (20, 24, 28))
    lung = np.pad(mask, [(1, n - s - 1) for n, s in zip(image.shape, SHAPE, strict=True)])
    noise = NoiseField(SEED, plane, origin=(-1, -1, -1))
    inputs = network_input(student, image[None], lung[None], np.zeros((1, 3), dtype=int), noise, t)
    expected = embed(student, student.unet.encode(*inputs))[0].numpy()
    where = usable[::2, ::2, ::2]
    found = features[:, ::2, ::2, ::2]
    expected = expected[:, *(slice(0, n) for n in where.shape)]
    np.testing.assert_allclose(found[:, where], expected[:, where], atol=1e-5)


def test_noise_of_a_widened_volume_is_that_of_the_volume_reflected():
    plain, widened = NoiseField(7, (12, 10)), NoiseField(7, (12, 10), origin=(-2, -3, -1))
    whole = plain.box(9, (0, 0, 0), (8, 12, 10))
    expected = np.pad(whole, [(2, 0), (3, 4), (1, 5)], mode="reflect")
    np.testing.assert_array_equal(widened.box(9, (0, 0, 0), (10, 19, 16)), expected)
    np.testing.assert_array_equal(widened.box(9, (4, 5, 6), (3, 4, 2)), expected[4:7, 5:9, 6:8])


@pytest.mark.parametrize(("start", "count", "length"), [(-3, 9, 5), (0, 4, 4), (2, 6, 5), (-7, 20, 3)])
def test_reflected_is_numpys_reflection(start, count, length):
    left, right = max(-start, 0), max(start + count - length, 0)
    expected = np.pad(np.arange(length), (left, right), mode="reflect")[max(start, 0) :][:count]
    np.testing.assert_array_equal(reflected(start, count, length), expected)
    assert (reflected(-2, 4, 1) == 0).all()


def test_a_uniform_lung_has_uniform_tokens_whichever_pass_made_them():
    student = tiny_student()
    spec = student.unet.spec
    # what the zeros beyond the volume's ends reach, in sites
    reach = (spec.trunk_reach + TOKEN * (sum(spec.context_reach) + max(spec.attention_window))) // 2 + 2
    hu = np.full([2 * (2 * reach + 2)] * 3, -850, dtype=np.int16)
    features, usable = encode_lung(hu, np.ones(hu.shape, dtype=bool), student, _config())
    assert usable.all()
    inner = features[:, *(slice(reach, n - reach) for n in usable.shape)]
    assert inner.shape[1:] == (2, 2, 2)  # one token of each pass
    assert np.ptp(inner, axis=(1, 2, 3)).max() < 1e-5
    assert np.ptp(features) > 0.1


def test_slabs_leave_no_seam_at_half_stride(volume):
    student = tiny_student()
    whole, usable = encode_lung(*volume, student, _config(timesteps=(0, 20)))
    parts, _ = encode_lung(*volume, student, _config(timesteps=(0, 20), slab_gib=1e-4))
    np.testing.assert_allclose(parts[:, usable], whole[:, usable], atol=1e-5)


def test_constant_features_stay_constant(volume, monkeypatch):
    student = tiny_student()
    hu, mask = volume

    def constant(student, windows, *arguments, **options):
        cells = [n // TOKEN for n in windows.shape[1:]]
        return np.full((len(windows), student.embedding, *cells), student.embedding**-0.5, dtype=np.float32)

    monkeypatch.setattr(encoding, "encode_windows", constant)
    features, usable = encode_lung(hu, mask, student, _config("windows"))
    np.testing.assert_allclose(features[:, usable], student.embedding**-0.5, rtol=1e-6)
    assert not features[:, ~usable].any()


def test_strides_that_do_not_fit_the_tokens_are_refused():
    student = tiny_student()
    assert lattice_cell(student, None) == TOKEN
    assert lattice_cell(student, 2) == 2
    for stride in (1, 3, 8):
        with pytest.raises(UsageError, match="tokens of 4 voxels: use one of 2, 4"):
            lattice_cell(student, stride)


def test_the_whole_stride_is_one_pass_with_the_same_tokens(volume):
    student = tiny_student()
    one = list(encode_passes(*volume, student, _config(token_stride=None, timesteps=(0, 20))))
    assert len(one) == 1
    again, _ = encode_lung(*volume, student, dataclasses.replace(_config(timesteps=(0, 20)), token_stride=TOKEN))
    np.testing.assert_array_equal(one[0].features, again)
