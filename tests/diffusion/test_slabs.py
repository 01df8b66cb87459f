"""A lung encoded in slabs against one pass over the whole volume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusion_fixture import tiny_student

import lungseg.segmentation.encoding as encoding
import lungseg.segmentation.slabs as slabs
from lungseg.config.cluster import ClusterConfig
from lungseg.diffusion.tokens import NoiseField, embed, network_input
from lungseg.diffusion.unet import UNetSpec
from lungseg.errors import MismatchError, UsageError
from lungseg.segmentation.encoding import encode_lung, resolve_encoding
from lungseg.segmentation.lattice import lattice_shape, pad_volume
from lungseg.segmentation.slabs import axis_pieces, encode_slabs, max_slab_voxels, needed_tokens, plan_boxes

SHAPE = (30, 38, 53)
SEED = 5


@pytest.fixture(scope="module")
def volume():
    rng = np.random.default_rng(0)
    hu = rng.integers(-1024, 200, SHAPE).astype(np.int16)
    grid = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    mask = sum(((g - n / 2) / (0.45 * n)) ** 2 for g, n in zip(grid, SHAPE, strict=True)) < 1
    return hu, mask


def _one_pass(student, hu, mask, timesteps):
    """Tokens of the whole padded volume through the network at once."""
    p = student.unet.spec.token_size
    target = [n * p for n in lattice_shape(hu.shape, p)]
    image = pad_volume(hu, target)
    padded = np.pad(mask, [(0, t - n) for t, n in zip(target, mask.shape, strict=True)])
    noise = NoiseField(SEED, (target[1], target[2]))
    blocks = []
    for t in timesteps:
        inputs = network_input(student, image[None], padded[None], np.zeros((1, 3), dtype=int), noise, t)
        blocks.append(embed(student, student.unet.encode(*inputs))[0])
    return torch.cat(blocks).numpy()


@pytest.mark.parametrize(
    ("network", "max_voxels"),
    [
        # token 4, reach 8: boxes of 28^3 with their halo
        ({}, 22_000),
        # token 4 by two levels: reach 1 + 3 + 6
        ({"stem": 1, "multipliers": (1, 2, 2)}, 50_000),
        # one level: nothing but the stem is finer than a token
        ({"stem": 4, "multipliers": (1,)}, 4_000),
    ],
)
def test_slabs_equal_one_pass(volume, network, max_voxels):
    student = tiny_student(**network)
    timesteps = (0, 20)
    expected = _one_pass(student, *volume, timesteps)
    features, usable = encode_slabs(student, *volume, timesteps=timesteps, seed=SEED, max_voxels=max_voxels)
    p = student.unet.spec.token_size
    halo = -(-student.unet.spec.trunk_reach // p) * p
    boxes = plan_boxes([n * p for n in usable.shape], token_size=p, halo=halo, max_voxels=max_voxels)
    assert np.prod([len(axis) for axis in boxes]) > 3
    np.testing.assert_allclose(features[:, usable], expected[:, usable], atol=1e-5)
    assert not features[:, ~usable].any()
    assert usable.any()
    assert not usable.all()


@pytest.mark.gpu
def test_slabs_on_cuda_equal_one_pass_on_the_cpu(volume, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    student = tiny_student()
    expected = _one_pass(student, *volume, (0, 20))
    student.unet.cuda()
    student.head.cuda()
    features, usable = encode_slabs(student, *volume, timesteps=(0, 20), seed=SEED, max_voxels=22_000)
    np.testing.assert_allclose(features[:, usable], expected[:, usable], atol=1e-4)


def test_a_halo_of_one_token_less_is_not_enough(volume, monkeypatch):
    student = tiny_student()
    expected = _one_pass(student, *volume, (0,))
    reach = UNetSpec.trunk_reach.fget
    monkeypatch.setattr(UNetSpec, "trunk_reach", property(lambda spec: reach(spec) - spec.token_size))
    features, usable = encode_slabs(student, *volume, timesteps=(0,), seed=SEED, max_voxels=22_000)
    assert np.abs(features - expected)[:, usable].max() > 1e-3


def test_the_trunk_reaches_exactly_as_far_as_is_said():
    # gradients of one token with respect to the input show how far it sees
    for network in ({}, {"stem": 1, "multipliers": (1, 2, 2), "encoder_blocks": 2}):
        student = tiny_student(**network)
        spec = student.unet.spec
        p, reach = spec.token_size, spec.trunk_reach
        n = 2 * (-(-reach // p)) + 1
        x = torch.randn(1, 2, n * p, p, p, generator=torch.Generator().manual_seed(0)).requires_grad_()
        student.unet.trunk(x, torch.tensor([0]))[0, :, n // 2].sum().backward()
        felt = np.flatnonzero(x.grad[0].abs().sum((0, 2, 3)).numpy())
        first = n // 2 * p
        assert felt[0] >= first - reach
        assert felt[-1] < first + p + reach
        assert felt[0] < first - reach + spec.stem  # not much wider than need be


def test_slabs_bound_the_memory_and_share_the_noise(volume, monkeypatch):
    student = tiny_student()
    seen = []
    trunk = student.unet.trunk
    monkeypatch.setattr(student.unet, "trunk", lambda x, t: seen.append(x.shape[2:].numel()) or trunk(x, t))
    whole, usable = encode_slabs(student, *volume, timesteps=(20,), seed=SEED, max_voxels=10**9)
    assert len(seen) == 1
    seen.clear()
    parts, _ = encode_slabs(student, *volume, timesteps=(20,), seed=SEED, max_voxels=22_000)
    assert max(seen) <= 22_000
    np.testing.assert_allclose(parts[:, usable], whole[:, usable], atol=1e-5)


def test_boxes_far_from_the_lung_are_not_computed(monkeypatch):
    student = tiny_student()
    hu = np.zeros((16, 32, 160), dtype=np.int16)
    mask = np.zeros(hu.shape, dtype=bool)
    mask[4:12, 8:24, 8:24] = True
    expected = _one_pass(student, hu, mask, (0,))
    seen = []
    trunk = student.unet.trunk
    monkeypatch.setattr(student.unet, "trunk", lambda x, t: seen.append(x.shape) or trunk(x, t))
    features, usable = encode_slabs(student, hu, mask, timesteps=(0,), seed=SEED, max_voxels=16 * 32 * 40)
    pieces = plan_boxes(hu.shape, token_size=4, halo=8, max_voxels=16 * 32 * 40)
    assert 0 < len(seen) < np.prod([len(axis) for axis in pieces])
    np.testing.assert_allclose(features[:, usable], expected[:, usable], atol=1e-5)


def test_row_54_no_memory_halves_the_slabs_and_gives_the_same(volume, monkeypatch, caplog):
    student = tiny_student()
    whole, usable = encode_slabs(student, *volume, timesteps=(0,), seed=SEED, max_voxels=10**9)
    monkeypatch.setattr(slabs, "MIN_SLAB_VOXELS", 1_000)
    trunk = student.unet.trunk

    def small_device(x, t):
        if x.shape[2:].numel() > 25_000:
            raise torch.cuda.OutOfMemoryError("injected")
        return trunk(x, t)

    monkeypatch.setattr(student.unet, "trunk", small_device)
    features, _ = encode_slabs(student, *volume, timesteps=(0,), seed=SEED, max_voxels=80_000)
    np.testing.assert_allclose(features[:, usable], whole[:, usable], atol=1e-5)
    assert "no memory for the slabs" in caplog.text
    monkeypatch.setattr(slabs, "MIN_SLAB_VOXELS", 40_000)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        encode_slabs(student, *volume, timesteps=(0,), seed=SEED, max_voxels=80_000)


def test_row_54_no_memory_halves_the_windows_and_gives_the_same(volume, monkeypatch, caplog):
    student = tiny_student()
    config = ClusterConfig(encoding="windows", timesteps=(0,), seed=SEED, batch_size=16)
    expected, usable = encode_lung(*volume, student, config)
    encode = encoding.encode_windows

    def small_device(student, windows, *arguments, **options):
        if len(windows) > 5:
            raise torch.cuda.OutOfMemoryError("injected")
        return encode(student, windows, *arguments, **options)

    monkeypatch.setattr(encoding, "encode_windows", small_device)
    features, _ = encode_lung(*volume, student, config)
    np.testing.assert_allclose(features[:, usable], expected[:, usable], atol=1e-5)
    assert "going on with 4 at a time" in caplog.text


def test_pieces_cover_an_axis_with_halos_inside_it():
    pieces = axis_pieces(40, 3, unit=4, halo=8)
    assert [piece.core for piece in pieces] == [slice(0, 16), slice(16, 32), slice(32, 40)]
    assert [piece.seen for piece in pieces] == [slice(0, 24), slice(8, 40), slice(24, 40)]


def test_plan_takes_the_cheapest_boxes_that_fit():
    shape, options = (64, 64, 128), {"token_size": 8, "halo": 16}
    whole = plan_boxes(shape, max_voxels=64 * 64 * 128, **options)
    assert [len(axis) for axis in whole] == [1, 1, 1]
    halved = plan_boxes(shape, max_voxels=64 * 64 * 80, **options)
    assert [len(axis) for axis in halved] == [1, 1, 2]  # the longest axis wastes least
    impossible = plan_boxes(shape, max_voxels=1, **options)
    assert max(piece.core.stop - piece.core.start for axis in impossible for piece in axis) == 8


def test_slab_memory_in_voxels():
    # measured growth of the resident memory on 64 x 96 x 96 voxels: 1036, 530 and 52 bytes a voxel
    specs = (UNetSpec(), UNetSpec(base_width=32), UNetSpec(base_width=16, multipliers=(1, 2), stem=2))
    for spec, measured in zip(specs, (1036, 530, 52), strict=True):
        assert max_slab_voxels(spec, 1.0) == pytest.approx(2**30 / measured, rel=0.1)
    assert max_slab_voxels(specs[0], 1e-12) == 1


def test_needed_tokens_are_those_that_reach_a_wanted_one():
    # changing what is not needed changes nothing; one pass is the judge
    student = tiny_student(stem=4, multipliers=(1,))
    unet = student.unet
    wanted = np.zeros((18, 20, 20), dtype=bool)
    wanted[9, 9, 9] = True
    needed = needed_tokens(wanted, unet.spec)
    assert needed.any()
    assert not needed.all()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, unet.spec.base_width, *wanted.shape, generator=generator).requires_grad_()
    unet.contextualise(tokens, torch.tensor([0]))[0, :, 9, 9, 9].sum().backward()
    felt = tokens.grad[0].abs().sum(0).numpy() > 0
    assert not (felt & ~needed).any()


def test_an_empty_mask_gives_no_tokens():
    student = tiny_student()
    hu = np.zeros((16, 16, 16), dtype=np.int16)
    features, usable = encode_slabs(student, hu, hu > 0, timesteps=(0, 20), seed=SEED, max_voxels=10**6)
    assert features.shape == (32, 4, 4, 4)
    assert not features.any()
    assert not usable.any()


def test_auto_takes_slabs_where_the_model_allows_and_windows_elsewhere(volume):
    local, patchwise = tiny_student(), tiny_student(attention="patch")
    assert resolve_encoding(local, "auto") == "slabs"
    assert resolve_encoding(local, "windows") == "windows"
    assert resolve_encoding(patchwise, "auto") == "windows"
    with pytest.raises(UsageError, match="use --encoding windows"):
        resolve_encoding(patchwise, "slabs")
    with pytest.raises(MismatchError, match="use windows instead"):
        encode_slabs(patchwise, *volume, timesteps=(0,), seed=SEED, max_voxels=10**6)


def test_both_encodings_agree_on_a_volume_of_one_patch():
    student = tiny_student(patch_size=(16, 24, 24))
    config = ClusterConfig(timesteps=(0, 20), seed=SEED, slab_gib=1e-3)
    hu = np.random.default_rng(1).integers(-1024, 200, (16, 24, 24)).astype(np.int16)
    mask = np.ones(hu.shape, dtype=bool)
    in_slabs, usable = encode_lung(hu, mask, student, dataclasses.replace(config, encoding="slabs"))
    in_windows, covered = encode_lung(hu, mask, student, dataclasses.replace(config, encoding="windows"))
    assert usable.all()
    assert covered.all()
    np.testing.assert_allclose(in_slabs, in_windows, atol=1e-5)


@pytest.mark.parametrize("values", [{"distill": "none"}, {"distill_weight": 0.0}], ids=str)
def test_tokens_are_as_long_as_the_student_makes_them(values: dict[str, str | float]) -> None:
    """Without a trained projection a token is the bottleneck, or the layer before: shorter than the projection."""
    student = tiny_student(embedding=24, **values)
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 200, (8, 16, 16)).astype(np.int16)
    mask = np.ones(hu.shape, bool)
    tokens, _ = encode_slabs(student, hu, mask, timesteps=(0, 5), seed=0, max_voxels=10**6)
    assert tokens.shape == (2 * student.unet.spec.token_channels, 2, 4, 4)
    np.testing.assert_allclose(np.linalg.norm(tokens[: student.embedding], axis=0), 1.0, rtol=1e-5)
