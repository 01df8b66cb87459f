"""Speed and memory of the student network, in turns with MONAI's DiffusionModelUNet and with itself.

Run: ``python tests/benchmarks/student_speed.py``. On a CPU: float32, one thread, CPU time. On a CUDA device: bfloat16
autocast, ours compiled, wall time between synchronisations. Every comparison is of calls made in turns within one run,
as machines are shared; the ratio is the median of the ratios of neighbouring calls. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lungseg.config.cluster import ClusterConfig
from lungseg.config.presets import make_config
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.acceleration import compile_network, fused_adamw
from lungseg.diffusion.checkpoint import Student
from lungseg.diffusion.distillation import StudentHead
from lungseg.diffusion.normalisation import HU_WINDOWS
from lungseg.diffusion.schedule import make_schedule
from lungseg.diffusion.unet import UNet, UNetSpec
from lungseg.radiomics.windows import keep_freed_memory
from lungseg.scan.phantom import PhantomSpec, make_phantom
from lungseg.segmentation.encoding import encode_lung
from lungseg.segmentation.slabs import encode_slabs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WIDTH, PATCH, BATCH = (64, (32, 96, 96), 4) if CUDA else (32, (16, 48, 48), 2)
PASS_PATCH = (32, 96, 96) if CUDA else (32, 64, 64)
"""Patch of the full and the early passes."""
MULTIPLIERS = (1, 2, 3, 4)
REPEATS = 30 if CUDA else 9
NUM_PASSES, NUM_FEATURE_PASSES = 250, 3
"""Steps of a reverse diffusion, and noise levels of the default features."""
NETWORKS = ("ours (channel norm)", "ours (group norm)", "MONAI", "MONAI, channels first", "ours, eager float32")


def network(name: str) -> nn.Module:
    """One of ``NETWORKS``: the same widths, blocks and attention, channels last in memory but for one."""
    if name.startswith("MONAI"):
        from monai.networks.nets import DiffusionModelUNet

        monai: nn.Module = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=2,
            out_channels=1,
            num_res_blocks=(1,) * len(MULTIPLIERS),
            channels=tuple(WIDTH * m for m in MULTIPLIERS),
            attention_levels=(False,) * len(MULTIPLIERS),
            norm_num_groups=32,
            num_head_channels=WIDTH * MULTIPLIERS[-1],
            use_flash_attention=True,
        )
        return monai.to(DEVICE, memory_format=_layout(name))  # type: ignore[call-overload, no-any-return]
    return UNet(UNetSpec(WIDTH, MULTIPLIERS, norm="group" if "group" in name else "channel")).to(DEVICE)


def _layout(name: str) -> torch.memory_format:
    return torch.contiguous_format if "channels first" in name else torch.channels_last_3d


def training_step(name: str) -> Callable[[], None]:
    """One step of a network: loss, gradients, AdamW."""
    net = network(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 2, *PATCH, generator=generator).to(DEVICE, memory_format=_layout(name))
    t = torch.full((BATCH,), 40, device=DEVICE)
    eager = "eager" in name
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=CUDA and not eager)
    if name.startswith("ours") and not eager:
        compile_network(net, (x, t), mode="auto", autocast=autocast)
    optimiser = fused_adamw(net.parameters(), learning_rate=1e-4, weight_decay=0.0, device=DEVICE)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast:
            output = net(x, t)
            output = output[0] if isinstance(output, tuple) else output
            loss = nn.functional.l1_loss(output, x[:, :1])
        loss.backward()
        optimiser.step()

    return step


def seconds(function: Callable[[], object]) -> float:
    """CPU time on a CPU, wall time to the end of the work on a device."""
    if not CUDA:
        begin = time.process_time()
        function()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turns(functions: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each call, made in turns after two calls each that do not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(2):
            function()
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median ratio of calls made one after the other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_mib(name: str) -> float:
    """Peak memory of three training steps above what there was before them; of a fresh process on a CPU."""
    if CUDA:
        step = training_step(name)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    code = f"from student_speed import *\nprint(steps_memory({name!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return float(done.stdout.splitlines()[-1])


def steps_memory(name: str) -> float:
    """Growth of this process's peak resident memory over three training steps, in MiB (Linux)."""
    torch.set_num_threads(1)
    step = training_step(name)
    before = peak_resident_kib()
    for _ in range(3):
        step()
    return (peak_resident_kib() - before) / 1024


def peak_resident_kib() -> int:
    """Peak resident memory of this process image; getrusage counts what the parent had before."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def training_table() -> None:
    """Training images per second and peak memory."""
    names = [name for name in NETWORKS if CUDA or "eager" not in name]
    times = in_turns({name: training_step(name) for name in names})
    print(f"Training step, width {WIDTH}, {BATCH} patches of {'x'.join(map(str, PATCH))}:\n")
    print("| network | images/s | ratio to MONAI | peak MiB |")
    print("|---|---|---|---|")
    for name in names:
        rate = BATCH / statistics.median(times[name])
        print(f"| {name} | {rate:.2f} | {ratio(times['MONAI'], times[name]):.2f} | {peak_mib(name):.0f} |")
    print()


def passes_table() -> None:
    """One early-exit pass and the default feature set against full passes."""
    net = UNet(UNetSpec(WIDTH, MULTIPLIERS)).to(DEVICE).eval()
    x = torch.randn(1, 2, *PASS_PATCH, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    t = torch.tensor([10], device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16) if CUDA else contextlib.nullcontext():
        times = in_turns({"full": lambda: net(x, t), "early": lambda: net.encode(x, t)})
    once = ratio(times["full"], times["early"])
    full, early = (statistics.median(times[name]) for name in ("full", "early"))
    print(f"Passes without gradients, width {WIDTH}, one patch of {'x'.join(map(str, PASS_PATCH))}:\n")
    print("| what | ms | ratio |")
    print("|---|---|---|")
    print(f"| one full pass | {1e3 * full:.0f} | |")
    print(f"| one early-exit pass | {1e3 * early:.0f} | {once:.1f} |")
    print(
        f"| {NUM_PASSES} full passes (one measured) against the default features ({NUM_FEATURE_PASSES} early passes) "
        f"| {1e3 * NUM_PASSES * full:.0f} / {1e3 * NUM_FEATURE_PASSES * early:.0f} | "
        f"{once * NUM_PASSES / NUM_FEATURE_PASSES:.0f} |\n"
    )


def slabs_table() -> None:
    """A phantom's lungs in slabs and in windows; how far slabs are from one pass."""
    config = make_config(TrainConfig, preset="tiny")
    torch.manual_seed(0)
    spec = UNetSpec(16, (1, 2), stem=2, attention_window=(4, 8, 8))
    unet, head = UNet(spec).to(DEVICE), StudentHead(32, config.embedding, 34, "layer").to(DEVICE)
    for module in (unet, head):
        for parameter in module.parameters():
            if not parameter.abs().sum():  # the branches that start at zero must count
                nn.init.normal_(parameter, std=0.05)
        module.eval().requires_grad_(False)
    student = Student(unet, head, HU_WINDOWS["companded"], make_schedule("cosine", 250), config, {})
    phantom = make_phantom(PhantomSpec((200.0, 250.0, 300.0), (1.5, 1.5, 1.5), "moderate", ("ggo",)), seed=720)
    image, mask = phantom.volume_hu, phantom.lungs > 0
    options: dict[str, Any] = {"timesteps": (0, 10, 25), "seed": 42}
    clustering = make_config(ClusterConfig, preset="tiny", encoding="windows", timesteps=(0, 10, 25))
    results: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    times = {}
    slabs = {"one pass": image.size * 8, "slabs of 1,000,000 voxels": 10**6, "slabs of 300,000 voxels": 300_000}
    for name, voxels in slabs.items():
        encode = partial(encode_slabs, student, image, mask, max_voxels=voxels, **options)
        times[name] = seconds(lambda name=name, encode=encode: results.update({name: encode()}))
    windows = "windows, half overlapping"
    times[windows] = seconds(lambda: results.update({windows: encode_lung(image, mask, student, clustering)}))
    expected, usable = results["one pass"]
    both = usable & results[windows][1]
    blocks = [tokens[:, both].reshape(len(options["timesteps"]), -1, int(both.sum())) for tokens, _ in results.values()]
    print(
        f"Lungs of a phantom of {'x'.join(map(str, image.shape))} voxels, {int(usable.sum())} tokens, tiny network:\n"
    )
    print("| encoding | s | largest difference to one pass | mean cosine with it |")
    print("|---|---|---|---|")
    for (name, (tokens, _)), block in zip(results.items(), blocks, strict=True):
        difference = np.abs(tokens - expected)[:, both].max()
        print(f"| {name} | {times[name]:.1f} | {difference:.1e} | {(block * blocks[0]).sum(1).mean():.4f} |")
    print()


def main() -> None:
    """All tables, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    tables = {"training": training_table, "passes": passes_table, "slabs": slabs_table}
    parser.add_argument("--only", choices=list(tables), help="one table instead of all")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    keep_freed_memory(torch.device(DEVICE))  # as in training, for both networks
    name = torch.cuda.get_device_name() if CUDA else "CPU, one thread"
    print(f"{name}, torch {torch.__version__}, {'bfloat16 autocast' if CUDA else 'float32'}\n")
    for table in [only] if only else tables:
        tables[table]()


if __name__ == "__main__":
    main()
