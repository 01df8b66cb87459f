"""The network: published size and cost, what the encoder sees, and its parts against their formulas."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from diffusion_fixture import randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lungseg.config.presets import make_config
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.attention import Attention
from lungseg.diffusion.checkpoint import unet_spec
from lungseg.diffusion.layers import ChannelNorm, ResidualBlock, convolution, fold, norm_silu, unfold
from lungseg.diffusion.unet import UNet, UNetSpec
from lungseg.errors import MismatchError, UsageError

PAPER = UNetSpec(base_width=64, multipliers=(1, 2, 3, 4), norm="group")
SMALL = UNetSpec(base_width=8, multipliers=(1, 2))


def _on_meta(spec):
    with torch.device("meta"):
        return UNet(spec)


def _count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def _inputs(shape=(8, 16, 16), batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, *shape, generator=generator)
    return x, torch.tensor([3, 40])[:batch]


def _random_unet(spec, seed=0):
    unet = UNet(spec)
    randomise(unet, seed)
    return unet.eval().requires_grad_(False)


def test_paper_network_has_its_published_size():
    unet = _on_meta(PAPER)
    assert _count(unet) == 38_605_569
    # METHOD 1.2: encoder + time 7.5, middle 7.5, decoder 23.6
    assert _count(unet.time, unet.conv_in, unet.encoder) / 1e6 == pytest.approx(7.5, abs=0.05)
    assert _count(unet.middle) / 1e6 == pytest.approx(7.5, abs=0.05)
    assert _count(unet.decoder) / 1e6 == pytest.approx(23.6, abs=0.05)


def test_paper_preset_is_that_network():
    spec = unet_spec(make_config(TrainConfig, preset="paper-code"))
    assert spec == PAPER


def test_small_network_has_its_stated_size():
    unet = _on_meta(UNetSpec(base_width=32))
    assert _count(unet) / 1e6 == pytest.approx(9.66, abs=0.005)
    assert _count(unet.time, unet.conv_in, unet.encoder, unet.middle) / 1e6 == pytest.approx(3.75, abs=0.005)


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_bottleneck_of_the_published_patch(norm):
    unet = _on_meta(UNetSpec(norm=norm))
    assert (unet.spec.token_size, unet.spec.token_channels) == (8, 256)
    with torch.device("meta"):
        x, t = torch.empty(1, 2, 32, 96, 96), torch.empty(1)
    with FlopCounterMode(display=False) as full:
        output, bottleneck = unet(x, t)
    with FlopCounterMode(display=False) as early:
        encoded = unet.encode(x, t)
    assert output.shape == (1, 1, 32, 96, 96)
    assert bottleneck.shape == encoded.shape == (1, 256, 4, 12, 12)
    # METHOD 1.2: 656 GMAC, of which 107 + 4 up to the bottleneck
    assert full.get_total_flops() / 2e9 == pytest.approx(656, abs=1)
    assert early.get_total_flops() / full.get_total_flops() == pytest.approx(0.17, abs=0.005)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (UNetSpec(base_width=8, multipliers=(1, 2), stem=2), 4),
        (UNetSpec(base_width=8, multipliers=(1, 2, 2), encoder_blocks=2), 4),
        (UNetSpec(base_width=8, multipliers=(1,), stem=4), 4),
        (UNetSpec(base_width=32, multipliers=(1, 2), norm="group"), 2),
    ],
)
def test_encode_equals_the_bottleneck_of_a_full_pass(spec, size):
    unet = _random_unet(spec)
    x, t = _inputs()
    output, bottleneck = unet(x, t)
    assert spec.token_size == size
    assert output.shape == (2, 1, 8, 16, 16)
    assert bottleneck.shape == (2, spec.token_channels, 8 // size, 16 // size, 16 // size)
    assert torch.equal(unet.encode(x, t), bottleneck)
    assert output.isfinite().all()


def test_every_parameter_gets_a_gradient():
    unet = UNet(UNetSpec(base_width=8, multipliers=(1, 2), stem=2, encoder_blocks=2))
    randomise(unet)
    output, _ = unet(*_inputs())
    output.square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_output_depends_on_mask_and_time():
    unet = _random_unet(SMALL)
    x, t = _inputs()
    other = x.clone()
    other[:, 1] = 0
    base = unet(x, t)[0]
    assert not torch.allclose(base, unet(other, t)[0], atol=1e-3)
    assert not torch.allclose(base, unet(x, t + 7)[0], atol=1e-3)


@pytest.mark.parametrize("stem", [1, 2])
def test_untrained_network_predicts_zero(stem):
    unet = UNet(UNetSpec(base_width=8, multipliers=(1, 2), stem=stem))
    output, bottleneck = unet(*_inputs())
    assert torch.equal(output, torch.zeros_like(output))
    assert bottleneck.std() > 0


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_unfold_inverts_fold(factor):
    x = torch.randn(2, 3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    folded = fold(x, factor)
    assert folded.shape == (2, 3 * factor**3, 4 // factor, 8 // factor, 12 // factor)
    assert torch.equal(unfold(folded, factor), x)


def test_fold_keeps_neighbours_together():
    x = torch.arange(2 * 4 * 4 * 4.0).view(1, 2, 4, 4, 4)
    folded = fold(x, 2)
    block = x[0, :, 2:4, 0:2, 2:4].reshape(-1)
    assert torch.equal(folded[0, :, 1, 0, 1], block)


@pytest.mark.parametrize("stem", [1, 2])
def test_channel_norm_features_do_not_depend_on_patch_size(stem):
    unet = _random_unet(UNetSpec(base_width=8, multipliers=(1, 2), stem=stem))
    unet.middle[1] = nn.Identity()  # attention sees the whole patch by design
    p = unet.spec.token_size
    x, t = _inputs((21 * p, 20 * p, 20 * p), batch=1)
    whole = unet.encode(x, t)
    crop = unet.encode(x[:, :, p : 20 * p, p : 19 * p, p : 19 * p], t)
    # a border is felt 8 tokens deep: 4 in the middle blocks, 2 in the last level, 2 in the levels above
    torch.testing.assert_close(crop[:, :, 8:11, 8:10, 8:10], whole[:, :, 9:12, 9:11, 9:11], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(crop[:, :, 0, 9, 9], whole[:, :, 1, 10, 10], atol=1e-3)


def test_group_norm_features_do():
    unet = _random_unet(UNetSpec(base_width=32, multipliers=(1,), norm="group"))
    unet.middle[1] = nn.Identity()
    x, t = _inputs((24, 24, 24), batch=1)
    whole, crop = unet.encode(x, t), unet.encode(x[:, :, 4:20, 4:20, 4:20], t)
    assert (crop[:, :, 8, 8, 8] - whole[:, :, 12, 12, 12]).abs().max() > 1e-3


def test_channel_norm_by_hand():
    norm = ChannelNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1, 1)
    rms = math.sqrt(12.5)
    expected = torch.tensor([3 / rms, 8 / rms]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=0)
    assert norm(torch.zeros_like(x)).abs().max() == 0
    half = norm(1e4 * x.bfloat16())  # squares are summed in float32
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=0)


def test_attention_equals_softmax_of_scaled_products():
    layer = Attention(6, "channel").requires_grad_(False)
    randomise(layer)
    x = torch.randn(2, 6, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    for n in range(2):
        columns = [layer.norm(x)[n, :, z, y, w] for z in range(2) for y in range(3) for w in range(4)]
        qkv = [layer.qkv.weight[:, :, 0] @ column + layer.qkv.bias for column in columns]
        for i, (z, y, w) in enumerate((z, y, w) for z in range(2) for y in range(3) for w in range(4)):
            scores = torch.stack([qkv[i][:6] @ other[6:12] / math.sqrt(6) for other in qkv])
            mixed = sum(share * other[12:] for share, other in zip(scores.exp() / scores.exp().sum(), qkv, strict=True))
            expected = x[n, :, z, y, w] + layer.project.weight[:, :, 0] @ mixed + layer.project.bias
            torch.testing.assert_close(layer(x)[n, :, z, y, w], expected, rtol=1e-4, atol=1e-5)


def test_residual_block_equals_its_formula():
    block = ResidualBlock(4, 6, 5, "channel").requires_grad_(False)
    randomise(block)
    generator = torch.Generator().manual_seed(1)
    x, time = torch.randn(2, 4, 3, 3, 3, generator=generator), torch.randn(2, 5, generator=generator)

    def silu(y):
        return y / (1 + (-y).exp())

    h = block.conv_in(silu(block.norm_in(x))) + (silu(time) @ block.time.weight.T + block.time.bias).view(2, 6, 1, 1, 1)
    expected = block.skip(x) + block.conv_out(silu(block.norm_out(h)))
    torch.testing.assert_close(block(x, time), expected, rtol=1e-5, atol=1e-5)


def _attend_by_hand(layer, tokens):
    """One head over the rows of tokens (L, C), from the definition."""
    q, k, v = (layer.norm(tokens.T[None])[0].T @ layer.qkv.weight[:, :, 0].T + layer.qkv.bias).chunk(3, dim=1)
    mixed = ((q @ k.T) / math.sqrt(q.shape[1])).softmax(1) @ v
    return tokens + mixed @ layer.project.weight[:, :, 0].T + layer.project.bias


@pytest.mark.parametrize("shape", [(2, 3, 4), (4, 6, 8), (5, 7, 9), (2, 6, 9)])
def test_attention_stays_within_its_windows(shape):
    window = (2, 3, 4)
    layer = Attention(6, "channel", window).requires_grad_(False)
    randomise(layer)
    x = torch.randn(2, 6, *shape, generator=torch.Generator().manual_seed(1))
    expected = torch.empty_like(x)
    for corner in itertools.product(*[range(0, n, w) for n, w in zip(shape, window, strict=True)]):
        part = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
        for n in range(2):
            region = x[n][:, *part]
            rows = _attend_by_hand(layer, region.flatten(1).T)
            expected[n][:, *part] = rows.T.view(region.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_patch_of_one_window_gives_what_it_gives_without_windows():
    spec = UNetSpec(base_width=8, multipliers=(1, 2), stem=2)
    whole, windowed = _random_unet(spec), _random_unet(dataclasses.replace(spec, attention_window=(2, 4, 4)))
    x, t = _inputs()
    assert torch.equal(whole(x, t)[0], windowed(x, t)[0])
    larger, _ = _inputs((16, 16, 16))
    assert not torch.allclose(whole(larger, t)[1], windowed(larger, t)[1], atol=1e-3)


def test_training_presets_attend_in_windows_of_one_patch_and_the_papers_to_the_patch():
    for preset, window in (("lungseg", (4, 12, 12)), ("small", (4, 8, 8)), ("tiny", (4, 8, 8)), ("paper-text", None)):
        spec = unet_spec(make_config(TrainConfig, preset=preset))
        assert spec.attention_window == window
        assert spec.is_local == (window is not None)


@pytest.mark.parametrize("norm", ["channel", "group"])
def test_two_dimensions(norm):
    spec = UNetSpec(base_width=32, multipliers=(1, 2), stem=2, dims=2, norm=norm, in_channels=1, out_channels=3)
    unet = UNet(spec)
    randomise(unet)
    x, t = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 40])
    output, bottleneck = unet(x, t)
    assert output.shape == (2, 3, 16, 24)
    assert bottleneck.shape == (2, 64, 4, 6)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


def test_a_volume_of_one_plane_of_weights_is_the_two_dimensional_network():
    # the middle plane of each kernel in a 2-D network gives what the 3-D one gives where nothing changes along z
    spec = UNetSpec(base_width=8, multipliers=(1, 2))
    solid = _random_unet(spec)
    flat = UNet(dataclasses.replace(spec, dims=2)).requires_grad_(False)
    state = {name: w.sum(2) if w.ndim == 5 else w for name, w in solid.state_dict().items()}
    flat.load_state_dict(state)
    plane, t = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([7])
    tall = plane[:, :, None].expand(-1, -1, 64, -1, -1)
    # zeros beyond the top and the bottom are felt 20 planes deep; attention mixes all planes: leave it out
    solid.middle[1] = flat.middle[1] = nn.Identity()
    torch.testing.assert_close(solid(tall, t)[0][:, :, 32], flat(plane, t)[0], rtol=1e-4, atol=1e-4)


def test_condition_channels_matter_and_must_be_given():
    spec = UNetSpec(base_width=8, multipliers=(1, 2), condition_channels=3)
    unet = _random_unet(spec)
    x, t = _inputs()
    condition = torch.randn(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(5))
    joined = _random_unet(dataclasses.replace(spec, in_channels=5, condition_channels=0))
    assert torch.equal(unet(x, t, condition)[0], joined(torch.cat([x, condition], 1), t)[0])
    assert not torch.allclose(unet(x, t, condition)[0], unet(x, t, 0 * condition)[0], atol=1e-3)
    with pytest.raises(MismatchError, match="takes 5 channels"):
        unet(x, t)


def test_input_must_fit_the_token_size():
    with pytest.raises(MismatchError, match="multiples of 2"):
        UNet(SMALL)(torch.zeros(1, 2, 8, 9, 8), torch.tensor([1]))


def test_named_blocks_and_no_deeper_than_asked():
    spec = UNetSpec(base_width=8, multipliers=(1, 2), encoder_blocks=2)
    unet = _random_unet(spec)
    x, t = _inputs()
    names = ("encoder.0.0", "encoder.0.1", "encoder.1.0", "encoder.1.1", "middle")
    decoder = ("decoder.1.0", "decoder.1.1", "decoder.1.2", "decoder.0.0", "decoder.0.1", "decoder.0.2")
    assert spec.block_names == names + decoder
    every = unet.activations(x, t, [*spec.block_names, "output"])
    output, bottleneck = unet(x, t)
    assert torch.equal(every["middle"], bottleneck)
    assert torch.equal(every["output"], output)
    for name in spec.block_names:
        size = spec.voxels_per_cell(name)
        assert every[name].shape[2:] == (8 // size, 16 // size, 16 // size)
        assert torch.equal(unet.activations(x, t, [name])[name], every[name])
    costs = []
    for name in spec.block_names:
        with FlopCounterMode(display=False) as counted:
            unet.activations(x, t, [name])
        costs.append(counted.get_total_flops())
    assert costs == sorted(set(costs))
    with pytest.raises(UsageError, match=r"no block encoder\.9\.0; this network has encoder\.0\.0"):
        unet.activations(x, t, ["encoder.9.0"])


@pytest.mark.parametrize("norm", ["channel", "group"])
def test_gradient_checkpointing_gives_the_same_gradients(norm):
    unet = UNet(UNetSpec(base_width=32, multipliers=(1, 2), stem=2, norm=norm))
    randomise(unet)
    x, t = _inputs()
    gradients = []
    for wanted in (False, True):
        unet.gradient_checkpointing = wanted
        unet.zero_grad()
        output, bottleneck = unet(x, t)
        (output.square().mean() + bottleneck.mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_gradient_checkpointing_keeps_less():
    unet = UNet(UNetSpec(base_width=8, multipliers=(1, 2), stem=2))
    kept = []
    for wanted in (False, True):
        unet.gradient_checkpointing = wanted
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(*_inputs())
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_fused_norm_and_silu_equal_their_formula():
    norm = ChannelNorm(6).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 6, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.silu(norm(x))
    torch.testing.assert_close(norm_silu(norm, x), expected)
    torch.testing.assert_close(norm_silu(norm, x.float()).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradcheck(lambda y, w: norm_silu(norm, y), (x, norm.weight))
    assert norm_silu(norm, torch.zeros_like(x)).abs().max() == 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dims", [2, 3])
def test_convolution_of_a_single_patch_equals_torch(dims, stride):
    # a batch of one takes another path on a CPU
    generator = torch.Generator().manual_seed(0)
    layer = convolution(dims, 4, 6, stride=stride)
    x = torch.randn(1, 4, *[8] * dims, generator=generator, requires_grad=True)
    plain = {2: nn.functional.conv2d, 3: nn.functional.conv3d}[dims]
    results = [layer(x), plain(x, layer.weight, layer.bias, stride=stride, padding=1)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias)) for y in results]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_every_feature_map_has_its_channels_last():
    # one map in another layout is copied at every convolution after it
    unet = UNet(UNetSpec(base_width=8, multipliers=(1, 2, 2), stem=2))
    layouts = {}

    def look(name):
        def hook(module, inputs, output):
            layouts[name] = output.is_contiguous(memory_format=torch.channels_last_3d)

        return hook

    for name, module in unet.named_modules():
        if isinstance(module, (ResidualBlock, nn.Conv3d, Attention)) and not name.endswith("skip"):
            module.register_forward_hook(look(name))
    x, t = _inputs((16, 16, 16))
    unet(x, t)
    assert len(layouts) > 20
    assert [name for name, last in layouts.items() if not last] == []
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in unet.parameters() if p.ndim == 5)


def test_bf16_autocast_is_close_and_finite():
    unet = _random_unet(UNetSpec(base_width=16, multipliers=(1, 2), stem=2))
    x, t = _inputs()
    expected = unet(x, t)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = unet(x, t)[0]
    assert output.isfinite().all()
    assert (output - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    unet = _random_unet(UNetSpec(base_width=16, multipliers=(1, 2), stem=2, attention_window=(2, 4, 4)))
    x, t = _inputs((16, 16, 16))
    expected = unet(x, t)
    found = unet.cuda()(x.cuda(), t.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-2)  # TF32 convolutions


def test_time_embedding_equals_its_formula():
    unet = _random_unet(SMALL)
    unet.time = nn.Identity()
    t = torch.tensor([0, 1, 25, 250])
    for row, embedding in zip(t.tolist(), unet.embed_time(t), strict=True):
        # half cosines, half sines, periods 2 pi ... 2 pi 1000 (exclusive): METHOD 1.2
        angles = [row * 1000 ** (-k / 4) for k in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert embedding.tolist() == pytest.approx(expected, abs=2e-5)


def test_time_embedding_ends_in_two_linear_layers():
    unet = _random_unet(SMALL)
    first, _, second = unet.time
    sinusoid = torch.tensor([[1.0] * 4 + [0.0] * 4])  # t = 0
    hidden = sinusoid @ first.weight.T + first.bias
    expected = hidden * hidden.sigmoid() @ second.weight.T + second.bias
    torch.testing.assert_close(unet.embed_time(torch.tensor([0])), expected)
