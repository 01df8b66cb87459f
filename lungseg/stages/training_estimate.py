"""What a training run will need, said before it starts, and what it took, said at its end."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from lungseg.config.execution import Execution, resolve_device
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.footprint import Footprint, device_peak, fitting_parts, footprint, gib
from lungseg.diffusion.training import Trainer, precision_of
from lungseg.stages.training_loop import Pace, Seat

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def estimate(config: TrainConfig, execution: Execution) -> dict[str, Any]:
    """Memory and arithmetic of a run on this machine, and settings that fit: JSON types, for ``--dry-run``."""
    device = resolve_device(execution.device)
    size = max(1, execution.gpus)
    cost = footprint(config, device.partition(":")[0])
    needed, limit = memory(config, cost, device=device, size=size)
    return {
        "device": device,
        "parameters": cost.parameters,
        "memory_needed": gib(needed),
        "memory_there": gib(limit),
        "advice": advice(config, cost, device=device, size=size) or "fits",
        "tflop_an_image": round(cost.flops / 1e12, 4),
    }


def memory(config: TrainConfig, cost: Footprint, *, device: str, size: int) -> tuple[int, int]:
    """Bytes a process needs and bytes there are: of its GPU, or of the machine shared by all processes."""
    kind = device.partition(":")[0]
    images = max(1, config.batch_size // size // config.accumulate)
    precision = precision_of(config, torch.device(device))
    return cost.memory_bytes(images=images, precision=precision, device=kind), _limit(device, size)


def advice(config: TrainConfig, cost: Footprint, *, device: str, size: int) -> str:
    """Which setting makes a run fit into memory; '' if it fits as it is."""
    needed, limit = memory(config, cost, device=device, size=size)
    if needed <= limit:
        return ""
    precision = precision_of(config, torch.device(device))
    parts = fitting_parts(
        config, cost, share=config.batch_size // size, precision=precision, device=device.partition(":")[0], limit=limit
    )
    remedy = (
        f"--accumulate {parts} fits" if parts else "no --accumulate fits: use a smaller --patch-size or --base-width"
    )
    return f"needs about {gib(needed)} of the {gib(limit)} of {device}: {remedy}"


def summary(trainer: Trainer, pace: Pace, seat: Seat) -> str:
    """Speed, peak memory and, where the device's peak is known, the share of it that was used."""
    rate = pace.images_a_second
    if math.isnan(rate):
        return f"peak memory {gib(_peak(seat.device))}"
    words = [f"{rate:.3g} images/s", f"peak memory {gib(_peak(seat.device))} a process"]
    if seat.device.startswith("cuda"):
        name = torch.cuda.get_device_name(seat.device)
        peak = device_peak(name, trainer.precision)
        if peak is not None:
            used = footprint(trainer.config).flops * rate / (peak * seat.size)
            words.append(f"{100 * used:.1f} % of the {peak / 1e12:.0f} TFLOP/s ({trainer.precision}) of {name}")
    return ", ".join(words)


def _limit(device: str, size: int) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file():  # of a container or a batch job; the word `max` where there is none
        words = _CGROUP_LIMIT.read_text(encoding="utf-8").strip()
        there = min(there, int(words)) if words.isdecimal() else there
    return there // size


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kept if sys.platform == "darwin" else kept * 1024
