"""The fused optimiser, and compilation with its way back."""

from __future__ import annotations

import pytest
import torch
from diffusion_fixture import randomise

from lungseg.diffusion.acceleration import compile_network, fused_adamw
from lungseg.diffusion.unet import UNet, UNetSpec

SPEC = UNetSpec(base_width=8, multipliers=(1,), stem=2)


def _network():
    unet = UNet(SPEC)
    randomise(unet)
    return unet


def _inputs():
    x = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([5])


def test_a_compiler_that_fails_is_a_warning_and_eager_mode(monkeypatch, caplog):
    def broken(function, **options):
        def fail(*inputs):
            raise RuntimeError("no working C++ compiler\nand a long story")

        return fail

    unet = _network()
    expected = unet(*_inputs())[0]
    monkeypatch.setattr(torch, "compile", broken)
    assert not compile_network(unet, _inputs(), mode="on")
    assert "cannot be compiled (RuntimeError: no working C++ compiler); going on without" in caplog.text
    assert torch.equal(unet(*_inputs())[0], expected)
    assert "forward" not in vars(unet)


def test_a_compiler_that_fails_in_the_backward_pass_is_one_too(monkeypatch, caplog):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("backward graph")

    unet = _network()
    compiled = lambda function, **options: lambda *inputs: Broken.apply(function(*inputs)[0])  # noqa: E731
    monkeypatch.setattr(torch, "compile", compiled)
    assert not compile_network(unet, _inputs(), mode="on")
    assert "backward graph" in caplog.text
    unet(*_inputs())[0].sum().backward()


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_nothing_is_compiled_when_off_or_on_a_cpu(monkeypatch, mode):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled"))
    assert not compile_network(_network(), _inputs(), mode=mode)


@pytest.mark.slow
def test_a_compiled_network_keeps_its_names_and_gives_the_same(monkeypatch):
    # the real compiler takes minutes on a CPU; its front end, with the graph run as it is, takes seconds
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager", **options))
    unet, eager = _network(), _network()
    names = list(unet.state_dict())
    assert compile_network(unet, _inputs(), mode="on")
    assert list(unet.state_dict()) == names
    assert all(p.grad is None for p in unet.parameters())
    for network in (unet, eager):
        network(*_inputs())[0].square().sum().backward()
    for (name, compiled), (_, plain) in zip(unet.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_cuda_compiles_the_network():
    unet = _network().cuda()
    inputs = tuple(x.cuda() for x in _inputs())
    expected = unet(*inputs)[0]
    assert compile_network(unet, inputs, mode="auto")
    torch.testing.assert_close(unet(*inputs)[0], expected, rtol=1e-2, atol=1e-2)


def test_adamw_is_fused_and_without_decay_it_is_adam():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimiser = fused_adamw([ours], learning_rate=1e-2, weight_decay=0.0, device="cpu")
    assert optimiser.defaults["fused"]
    adam = torch.optim.Adam([theirs], lr=1e-2)
    for _ in range(3):
        ours.grad = torch.randn(3, 4, generator=generator)
        theirs.grad = ours.grad.clone()
        optimiser.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)
    assert (ours - start).abs().min() > 1e-3
