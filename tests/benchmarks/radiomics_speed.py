"""Speed and memory of the radiomic descriptor: CPU time of one thread, in turns with what it is compared with.

Run: ``python tests/benchmarks/radiomics_speed.py``. Prints Markdown tables. Times are medians of CPU time; every
comparison is of calls made in turns within one run, as machines are shared. mahotas is compared with where installed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lungseg.radiomics import first_order, gabor, glcm, lbp
from lungseg.radiomics.dense import dense_descriptors, site_corners
from lungseg.radiomics.descriptor import DEFAULT_CHUNK_BYTES, compute_descriptors
from lungseg.radiomics.glcm import Aggregation
from lungseg.radiomics.pyradiomics import _feature_classes, _first_order, _glcm
from lungseg.radiomics.windows import HALO_VOXELS, keep_freed_memory
from lungseg.scan.phantom import Phantom, PhantomSpec, make_phantom

EDGE = 32
REPEATS = 7
MEMORY_PATCHES = 10_000
LARGE_VOLUME, FEWER_SLICES = (300, 400, 500), (40, 400, 500)
"""Voxels; the second for the slower settings."""


def cpu_ms(functions: dict[str, tuple[Callable[[], object], int]], repeats: int = REPEATS) -> dict[str, float]:
    """Median CPU time in ms per item of each function (with how many items it does), called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function, _ in functions.values():
        function()
    for _ in range(repeats):
        for name, (function, items) in functions.items():
            begin = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - begin) / items)
    return {name: statistics.median(values) for name, values in times.items()}


def chest() -> Phantom:
    """A phantom of 160 x 200 x 240 voxels with four diseases."""
    diseases = ("emphysema", "ggo", "fibrosis", "consolidation")
    return make_phantom(PhantomSpec((200.0, 250.0, 300.0), (1.25, 1.25, 1.25), "moderate", diseases), seed=720)


def noise_patches(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """White noise of 80 HU, all lung."""
    values = -800 + 80 * torch.randn((count, EDGE, EDGE, EDGE), generator=torch.Generator().manual_seed(0))
    return values, torch.ones_like(values, dtype=torch.bool)


def phantom_patches(phantom: Phantom, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of the phantom with at least half lung."""
    rng = np.random.default_rng(0)
    values, masks = [], []
    while len(values) < count:
        box = tuple(slice(c, c + EDGE) for c in (rng.integers(0, n - EDGE) for n in phantom.lungs.shape))
        if np.mean(phantom.lungs[box] > 0) >= 0.5:
            values.append(phantom.volume_hu[box].astype(np.float32))
            masks.append(phantom.lungs[box] > 0)
    return torch.from_numpy(np.stack(values)), torch.from_numpy(np.stack(masks))


def common_features(kind: str, patches: torch.Tensor, masks: torch.Tensor) -> str:
    """GLCM and first-order: ours, pyradiomics, mahotas."""
    few = 8
    arrays = [(patch.numpy().astype(np.float64), mask.numpy()) for patch, mask in zip(patches, masks, strict=True)]
    classes = _feature_classes()

    def ours() -> None:
        first_order.first_order_features(patches, masks)
        glcm.glcm_features(patches, masks)

    def pyradiomics() -> None:
        for patch, mask in arrays[:few]:
            _first_order(classes, patch, mask)
            _glcm(classes, patch, mask, "merged")

    functions: dict[str, tuple[Callable[[], object], int]] = {
        "ours": (ours, len(patches)),
        "pyradiomics": (pyradiomics, few),
    }
    try:
        from mahotas.features import haralick

        levels = glcm.grey_levels(patches, masks).add(1).mul(masks).numpy().astype(np.uint8)  # 0: not lung

        def mahotas() -> None:
            for volume in levels[:few]:
                haralick(volume, ignore_zeros=True, compute_14th_feature=True, return_mean=True)

        functions["mahotas"] = (mahotas, few)
    except ImportError:
        pass
    found = cpu_ms(functions)
    mahotas_ms = f"{found['mahotas']:.1f} ({found['mahotas'] / found['ours']:.0f} x)" if "mahotas" in found else "–"
    ratio = found["pyradiomics"] / found["ours"]
    return f"| {kind} | {found['ours']:.2f} | {found['pyradiomics']:.1f} | **{ratio:.0f} x** | {mahotas_ms} |"


def by_family(kind: str, patches: torch.Tensor, masks: torch.Tensor) -> str:
    """Each family, and all 34."""
    median = torch.tensor(-850.0)
    count = len(patches)
    found = cpu_ms(
        {
            "first": (lambda: first_order.first_order_features(patches, masks), count),
            "glcm": (lambda: glcm.glcm_features(patches, masks), count),
            "no_mcc": (lambda: glcm.glcm_features(patches, masks, mcc=False), count),
            "lbp": (lambda: lbp.lbp_features(patches, masks), count),
            "gabor": (lambda: gabor.gabor_features(patches, masks, lung_median_hu=median), count),
            "all": (lambda: compute_descriptors(patches, masks, lung_median_hu=median), count),
        }
    )
    numbers = " | ".join(f"{value:.2f}" for value in found.values())
    return f"| {kind} | {count} | {numbers} | {1e3 / found['all']:.0f} |"


def windows_with_halo(
    phantom: Phantom, window: int, stride: int, sites: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of some sites of the lattice, cut out with their halo."""
    pad = window + max(HALO_VOXELS)
    arrays = [np.pad(phantom.volume_hu, pad).astype(np.float32), np.pad(phantom.lungs > 0, pad)]
    corners = site_corners(phantom.lungs.shape, window=window, stride=stride)
    boxes = []
    for site in sites.tolist():
        starts = [int(corners[axis][index]) + pad for axis, index in enumerate(site)]
        boxes.append(tuple(slice(c - h, c + window + h) for c, h in zip(starts, HALO_VOXELS, strict=True)))
    values, masks = (torch.from_numpy(np.stack([array[box] for box in boxes])) for array in arrays)
    return values, masks


def dense_against_patches(phantom: Phantom, window: int, stride: int) -> str:
    """A whole volume in dense mode against 24 of its windows one by one, with and without a halo."""
    volume, mask = torch.from_numpy(phantom.volume_hu), torch.from_numpy(phantom.lungs) > 0
    median = float(volume[mask].float().median())
    described = dense_descriptors(volume, mask, lung_median_hu=median, window=window, stride=stride)
    valid = described[..., 0].isfinite().nonzero()
    chosen = valid[torch.randperm(len(valid), generator=torch.Generator().manual_seed(0))[:24]]
    values, masks = windows_with_halo(phantom, window, stride, chosen)
    own = (slice(None), *(slice(h, -h) for h in HALO_VOXELS))
    scalar = torch.tensor(median)

    def dense() -> None:
        dense_descriptors(volume, mask, lung_median_hu=median, window=window, stride=stride)

    found = cpu_ms(
        {
            "dense": (dense, len(valid)),
            "halo": (lambda: compute_descriptors(values, masks, lung_median_hu=scalar, halo=True), len(chosen)),
            "window": (
                lambda: compute_descriptors(values[own].contiguous(), masks[own].contiguous(), lung_median_hu=scalar),
                len(chosen),
            ),
        },
        repeats=3,
    )
    ratios = " | ".join(f"{found[name]:.2f} ({found[name] / found['dense']:.1f} x)" for name in ("halo", "window"))
    total = found["dense"] * len(valid) / 1e3
    return f"| {window}^3 | {stride} | {len(valid)} | {found['dense']:.3f} | {total:.1f} | {ratios} |"


def in_new_process(*arguments: str) -> str:
    """Run this file in a process of its own, for its memory; returns a row of a table."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def peak_kib() -> int:
    """Peak memory of this process (Linux); what ``resource`` tells of a new process includes that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0])


def describe_many(dtype: str) -> None:
    """Describe 10,000 patches of 32 voxels cubed held in memory, and print the peak of the process."""
    torch.set_num_threads(1)
    shape = (MEMORY_PATCHES, EDGE, EDGE, EDGE)
    generator = torch.Generator().manual_seed(0)
    patches = torch.empty(shape, dtype=getattr(torch, dtype))
    for index in range(0, MEMORY_PATCHES, 100):
        patches[index : index + 100] = -800 + 80 * torch.randn((100, *shape[1:]), generator=generator)
    masks = torch.ones(shape, dtype=torch.bool)
    held = patches.nbytes + masks.nbytes
    found = compute_descriptors(patches, masks, lung_median_hu=torch.tensor(-850.0))
    assert bool(found.isfinite().all())
    peak = peak_kib()
    print(f"| {dtype} | {held / 2**30:.2f} | {peak / 2**20:.2f} |")


def describe_densely(stride: str, aggregation: str) -> None:
    """Describe a large volume in dense mode, and print by how much the peak of the process grew, and the CPU time."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    large = (stride, aggregation) == ("8", "merged")
    volume = torch.empty(LARGE_VOLUME if large else FEWER_SLICES, dtype=torch.int16)
    for values in volume:
        values.copy_(-800 + 80 * torch.randn(values.shape, generator=generator))
    mask = torch.ones_like(volume, dtype=torch.bool)
    volume[0, 0, :2] = torch.tensor([-1024, 500])  # all grey levels
    few = (slice(0, 16), slice(0, 32), slice(0, 32))
    dense_descriptors(volume[few], mask[few], lung_median_hu=-800.0, window=32, stride=8)  # loads what torch needs
    before, begin = peak_kib(), time.process_time()
    how: Aggregation = "mean" if aggregation == "mean" else "merged"
    found = dense_descriptors(volume, mask, lung_median_hu=-800.0, window=32, stride=int(stride), aggregation=how)
    grown = (peak_kib() - before) / 2**10
    size = " x ".join(map(str, volume.shape))
    seconds = time.process_time() - begin
    print(f"| {size} | {stride} | {how} | {found[..., 0].numel()} | {seconds:.0f} | {grown:.0f} |")


def main() -> None:
    """Print all tables."""
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    phantom = chest()
    kinds = {"noise, 80 HU": noise_patches(64), "phantom": phantom_patches(phantom, 64)}
    print(
        "GLCM 14 and first-order 4 of 32^3 patches, without halo, ms a patch (mahotas: its 14 GLCM statistics only):\n"
    )
    print("| patches | lungseg | pyradiomics | ratio | mahotas |\n|---|---|---|---|---|")
    for kind, (patches, masks) in kinds.items():
        print(common_features(kind, patches, masks), flush=True)
    print("\nBy family, ms a patch of 32^3:\n")
    print("| patches | number | first-order | GLCM | GLCM, no MCC | LBP | Gabor | all 34 | patches/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, (patches, masks) in kinds.items():
        print(by_family(kind, patches, masks), flush=True)
    print(f"\nDense mode over a phantom of {' x '.join(map(str, phantom.lungs.shape))} voxels, ms a site:\n")
    print("| window | stride | sites | dense | whole lung, s | windows with halo | windows without |")
    print("|---|---|---|---|---|---|---|")
    for window, stride in ((32, 8), (16, 8), (8, 8), (32, 4)):
        print(dense_against_patches(phantom, window, stride), flush=True)
    print(f"\nPeak memory of a process that describes {MEMORY_PATCHES} patches of 32^3 it holds, GiB:\n")
    print("| patches held as | patches and masks | peak |\n|---|---|---|")
    for dtype in ("int16", "float32"):
        print(in_new_process(dtype), flush=True)
    print(
        "\nDense mode, windows of 32, all lung: growth of the peak over a process that holds the volume, MiB (budget of"
    )
    print(f"the co-occurrence matrices: {DEFAULT_CHUNK_BYTES / 2**20:.0f} MiB):\n")
    print("| volume | stride | aggregation | sites | CPU s | MiB |\n|---|---|---|---|---|---|")
    for stride, aggregation in (("8", "merged"), ("4", "merged"), ("8", "mean")):
        print(in_new_process(stride, aggregation), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        describe_many(sys.argv[1])
    elif len(sys.argv) == 3:
        describe_densely(sys.argv[1], sys.argv[2])
    else:
        main()
