"""What a training run writes beside its weights: stats.jsonl, pictures, event files, and the alarm of a collapse."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.collapse import CollapseMonitor
from lungseg.diffusion.sampling import sample_dpm_solver
from lungseg.diffusion.training import Trainer
from lungseg.errors import UsageError
from lungseg.store.atomic import canonical_json, write_bytes, write_text

log = logging.getLogger(__name__)

PREVIEW_PATCHES = 4
PREVIEW_STEPS = 20
"""Solver steps of a preview: to see whether patches look like lung, not to judge them."""
_PREVIEW_STREAM = 2**62 + 2**60
"""Separates the noise of previews from that of images."""


class TrainingRecord:
    """The lines of a run, written on rank 0 only; the same run gives the same bytes (no times)."""

    def __init__(self, folder: Path, config: TrainConfig, *, images: int, active: bool) -> None:
        """Continue the record in ``folder`` from ``images`` on: later lines will be made again.

        Raises
        ------
        UsageError
            If TensorBoard is asked for and not installed.
        """
        self._folder = folder
        self._active = active
        self._monitor = CollapseMonitor.of_run(config)
        self._lines = []
        path = folder / "stats.jsonl"
        if active and path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self._lines = [line for line in lines if line["images"] <= images]
        for line in self._lines:
            self._monitor.look(line)  # an alarm of an earlier life of the run is not repeated
        self._events = _Events(folder / "tensorboard", images) if active and config.tensorboard else None

    def add(self, images: int, values: Mapping[str, float]) -> None:
        """One line; values that are not finite become null."""
        if not self._active:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line: dict[str, Any] = {"images": images, **finite}
        self._lines.append(line)
        alarm = self._monitor.look(line)
        if alarm:
            log.warning("train-ddpm: after %d images %s", images, alarm)
        if self._events:
            self._events.add(images, finite)

    def write(self) -> None:
        """Bring all lines to the disk."""
        if self._active:
            text = "".join(canonical_json(line) + "\n" for line in self._lines)
            write_text(self._folder / "stats.jsonl", text)

    def preview(self, trainer: Trainer) -> None:
        """Write ``previews/<images>.png``: some patches the averaged weights draw, always from the same noise."""
        if self._active and not trainer.model.window.per_volume:
            name = f"{trainer.images:010d}.png"
            self._picture(self._folder / "previews" / name, lambda draw: draw.samples_png(_draw(trainer)))

    def finish(self) -> None:
        """Write ``curves.png`` and close the event files."""
        if self._active:
            self._picture(self._folder / "curves.png", lambda draw: draw.curves_png(self._lines))
        if self._events:
            self._events.close()

    @staticmethod
    def _picture(path: Path, make: Callable[[Any], bytes]) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            log.warning("train-ddpm: %s is not drawn, as matplotlib is not installed", path.name)
            return
        from lungseg.report import training_curves

        write_bytes(path, make(training_curves))


class _Events:
    """TensorBoard event files; whatever goes wrong with them never stops the training (RELIABILITY 61)."""

    def __init__(self, folder: Path, images: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs the package tensorboard: pip install 'lungseg[tensorboard]'"
            ) from error
        self._writer: Any = None
        self._attempt(lambda: setattr(self, "_writer", SummaryWriter(str(folder), purge_step=images)))

    def add(self, images: int, line: Mapping[str, float | None]) -> None:
        """Scalars of one line."""
        if self._writer is not None:
            scalars = {key: value for key, value in line.items() if value is not None}
            self._attempt(lambda: [self._writer.add_scalar(key, value, images) for key, value in scalars.items()])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._attempt(lambda: self._writer.close())

    def _attempt(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # a logger of another project: any class of error
            log.warning("train-ddpm: TensorBoard is switched off: %s: %s", type(error).__name__, error)
            self._writer = None


@torch.no_grad()
def _draw(trainer: Trainer) -> np.ndarray:
    """Patches int16 HU (N, D, H, W), all lung, by a few solver steps."""
    config, schedule, unet = trainer.config, trainer.model.schedule, trainer.ema.unet
    shape = (PREVIEW_PATCHES, *config.patch_size)
    generator = np.random.Generator(np.random.Philox(key=[config.seed, _PREVIEW_STREAM]))
    dtype = next(unet.parameters()).dtype
    x_T = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(trainer.device, dtype)
    mask = torch.ones_like(x_T)

    def predict_x_0(x_t: torch.Tensor, t: int) -> torch.Tensor:
        times = torch.full((len(x_t),), t, device=trainer.device)
        parts = [
            unet(torch.stack([x, m], dim=1), one)[0][:, 0]  # one at a time: less memory than training takes
            for x, m, one in zip(x_t.split(1), mask.split(1), times.split(1), strict=True)
        ]
        return schedule.to_x_0(x_t, torch.cat(parts), times, config.prediction)

    with torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=trainer.precision == "bf16"):
        x_0 = sample_dpm_solver(predict_x_0, schedule, x_T, steps=min(PREVIEW_STEPS, config.timesteps))
    return trainer.model.window.denormalise(x_0.clamp(-1, 1)).round().to(torch.int16).cpu().numpy()
