"""What a label map of a full-size chest costs: CPU seconds and peak memory from ``volume.h5`` to ``labels.h5``.

Run: ``python tests/benchmarks/full_chest.py FOLDER [--benchmark TABLES] [--rows rules,radiomics,diffseglung]
[--bundle FILE]``. A phantom is made in FOLDER once. Each method runs in a process of its own, with one thread: its CPU
seconds (start of Python and loading of the model included) and the high-water mark of its memory (Linux). With
``--published`` the authors' protocol is extrapolated from measured windows. Prints Markdown; 1 if a method is above the
limits of 300 s and 4 GiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from fitted_rows import FittedRow, add_options, chosen_rows

from lungseg.config.benchmark import BenchmarkConfig
from lungseg.config.execution import Execution
from lungseg.config.phantom import PhantomConfig
from lungseg.config.presets import make_config
from lungseg.config.train_ddpm import TrainConfig
from lungseg.errors import UsageError
from lungseg.stages.benchmark_costs import Costs
from lungseg.stages.benchmark_rows import stage_config
from lungseg.stages.phantom import phantom
from lungseg.store.cases import Store
from lungseg.store.patches import patch_table

LIMIT_S, LIMIT_GIB = 300.0, 4.0
SEED = 630
# the authors' protocol, METHOD 1.4, 1.5, 1.7
PUBLISHED_SPACING_MM = 0.6
PUBLISHED_LEVELS = (25, 75, 120)
PUBLISHED_MIN_LUNG = 0.01
PUBLISHED_COMPONENTS = 30
MIN_WINDOWS = 10
VOXEL_SAMPLES = (50_000, 100_000, 200_000)


def store_for(folder: Path, fitted: FittedRow | None, config: BenchmarkConfig) -> Store:
    """A store of one full-size phantom at the spacing of a method."""
    settings = stage_config(
        config, PhantomConfig, "phantom", num=1, seed=SEED, severity="moderate", format="store",
        extent_mm=config.extent_mm,
    )  # fmt: skip
    if fitted is not None and fitted.model is not None:
        from lungseg.diffusion.checkpoint import load_student

        spacing = float(load_student(fitted.model).card["spacing_mm"])
        settings = dataclasses.replace(settings, store_spacing_mm=spacing)
    path = folder / f"chest-{settings.store_spacing_mm:g}"
    phantom(path, settings, execution=Execution(quiet=True)).require_complete()
    return Store(path)


def map_here(fitted: FittedRow, store: Store, folder: Path) -> dict[str, float]:
    """Map the phantom in this process, which must be a fresh one."""
    costs = Costs(folder / f"seconds-{fitted.row.name}.json")
    begin = time.perf_counter()
    fitted.map(store, costs, execution=Execution(quiet=True))
    wall = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return {"wall": wall, "cpu": time.process_time(), "peak_gib": peak}


def measured(name: str, store: Store, options: argparse.Namespace) -> dict[str, float]:
    """Figures of one method in a child process, which begins without its label map."""
    for case_id in store.case_ids():
        for kind in ("clusters", "labels"):
            store.case_file(case_id, kind, name).unlink(missing_ok=True)
    arguments = [str(options.folder), "--rows", options.rows, "--preset", options.preset, "--child", name]
    for flag in ("benchmark", "bundle"):
        if getattr(options, flag):
            arguments += [f"--{flag}", str(getattr(options, flag))]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def published_protocol(store: Store, windows: int) -> None:
    """Full passes over every window at each noise level, then StandardScaler and PCA of every lung voxel."""
    import torch
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    from lungseg.diffusion.unet import UNet, UNetSpec

    torch.set_num_threads(1)
    config = make_config(TrainConfig, preset="paper-text")
    case_id = store.case_ids()[0]
    with store.open(case_id, "volume") as volume:
        mask = volume.read("mask") > 0
        spacing = volume.provenance["grid"]["spacing_mm"]
    scale = PUBLISHED_SPACING_MM / np.asarray(spacing)
    size = [max(1, round(float(n * s))) for n, s in zip(config.patch_size, scale, strict=True)]
    corners, _ = patch_table(mask, size=size, stride=[max(1, n // 2) for n in size], min_fraction=PUBLISHED_MIN_LUNG)
    voxels = int(mask.sum() / np.prod(scale))
    net = UNet(UNetSpec(config.base_width, config.multipliers, norm=config.norm)).eval()
    generator = torch.Generator().manual_seed(0)
    times = []
    with torch.no_grad():
        for _ in range(max(windows, MIN_WINDOWS)):
            x = torch.randn(1, 2, *config.patch_size, generator=generator)
            begin = time.process_time()
            net(x, torch.tensor([PUBLISHED_LEVELS[0]]))
            times.append(time.process_time() - begin)
    one = statistics.mean(times)
    features = config.embedding * len(PUBLISHED_LEVELS)
    rng = np.random.default_rng(0)
    reduction = []
    for count in VOXEL_SAMPLES:
        table = rng.standard_normal((count, features), dtype=np.float32)
        begin = time.process_time()
        PCA(PUBLISHED_COMPONENTS, random_state=0).fit_transform(StandardScaler().fit_transform(table))
        reduction.append(time.process_time() - begin)
    slope = float(np.polyfit(VOXEL_SAMPLES, reduction, 1)[0])
    passes, reduce_s = len(corners) * len(PUBLISHED_LEVELS) * one, slope * voxels
    print(
        f"\nThe authors' protocol, extrapolated: width {config.base_width}, windows of "
        f"{'x'.join(map(str, config.patch_size))} voxels of {PUBLISHED_SPACING_MM} mm at half stride, with at least "
        f"{100 * PUBLISHED_MIN_LUNG:.0f} % lung: {len(corners)}; full passes at {len(PUBLISHED_LEVELS)} noise levels, "
        f"{one:.2f} s each (mean of {len(times)} measured, {min(times):.2f} to {max(times):.2f}); StandardScaler and "
        f"PCA {PUBLISHED_COMPONENTS} of {features} features of {voxels / 1e6:.1f} M lung voxels, from "
        f"{', '.join(f'{n} voxels: {s:.2f} s' for n, s in zip(VOXEL_SAMPLES, reduction, strict=True))}.\n"
    )
    print("| step | CPU s | memory of its table, GiB |\n|---|---|---|")
    gib = voxels * features * 4 / 2**30
    print(f"| passes | {passes:.0f} | |\n| scaler and PCA | {reduce_s:.0f} | {gib:.1f} |")
    print(f"| both | {passes + reduce_s:.0f} | {gib:.1f} |")


def main() -> int:
    """Print Markdown tables; 1 if a method needs more than the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the phantom and its maps")
    add_options(parser)
    parser.add_argument("--published", type=int, default=0, metavar="WINDOWS", help="windows to measure, at least 10")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        config, rows = chosen_rows(options)
    except UsageError as error:
        parser.error(str(error))
    if options.child:
        fitted = next(fitted for fitted in rows if fitted.row.name == options.child)
        print(json.dumps(map_here(fitted, store_for(options.folder, fitted, config), options.folder)))
        return 0
    print("| method | CPU s | wall s | peak GiB |\n|---|---|---|---|")
    too_much = 0
    store = None
    for fitted in rows:
        store = store_for(options.folder, fitted, config)
        found = measured(fitted.row.name, store, options)
        print(f"| {fitted.row.name} | {found['cpu']:.0f} | {found['wall']:.0f} | {found['peak_gib']:.2f} |", flush=True)
        too_much += found["cpu"] > LIMIT_S or found["peak_gib"] > LIMIT_GIB
    store = store or store_for(options.folder, None, config)
    with store.open(store.case_ids()[0], "volume") as volume:
        shape, lung = volume.shape("image"), int((volume.read("mask") > 0).sum())
    print(f"\nThe last phantom has {'x'.join(map(str, shape))} voxels, {lung / 1e6:.2f} M of lung.")
    if options.published:
        published_protocol(store, options.published)
    return int(too_much > 0)


if __name__ == "__main__":
    sys.exit(main())
