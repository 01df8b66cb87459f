"""One process of a training run: batches in order, what is logged when, checkpoints, and stopping at a signal."""

from __future__ import annotations

import dataclasses
import logging
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from lungseg.config.execution import Execution
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import load_training_state, save_training_state
from lungseg.diffusion.training import StepResult, Trainer
from lungseg.diffusion.training_images import HELD_OUT_FIRST, TrainingImages, teacher_halo
from lungseg.errors import Interrupted, ResourceError, StoreError
from lungseg.radiomics.descriptor import Standardisation
from lungseg.segmentation.reduction import effective_rank
from lungseg.stages.launch import local_processes
from lungseg.stages.progress import progress
from lungseg.stages.training_record import TrainingRecord
from lungseg.store.patches import PatchSource

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
MIN_RANK_TOKENS = 8
"""Tokens of a batch from which their effective rank says anything: it is below their number."""
_WORKER_DIED = re.compile(r"DataLoader worker \(pid.*(is killed by signal|exited unexpectedly)")


@dataclass(frozen=True)
class Seat:
    """Which of how many processes this one is, and where its tensors live."""

    rank: int
    size: int
    device: str


@dataclass(frozen=True)
class Material:
    """What a run learns from."""

    volumes: tuple[Path, ...]
    """``volume.h5`` of the cases trained on."""
    held_out: tuple[Path, ...]
    """Of those never trained on."""
    standardisations: tuple[Standardisation, ...]


@dataclass(frozen=True)
class Pace:
    """How fast a run was, from its second step on."""

    images: int
    seconds: float

    @property
    def images_a_second(self) -> float:
        """Over all processes; NaN for runs too short to say."""
        return self.images / self.seconds if self.images and self.seconds > 0 else float("nan")


class TrainingLoop:
    """Trains until all images are seen, or a signal comes; the same folder again continues."""

    def __init__(self, output: Path, config: TrainConfig, material: Material, seat: Seat, execution: Execution) -> None:
        self._output, self._config, self._material = output, config, material
        self._seat, self._execution = seat, execution
        self._stop_signal = 0

    def run(self) -> tuple[Trainer, Pace]:
        """Train.

        Raises
        ------
        MismatchError
            If training diverges.
        ResourceError
            If the device runs out of memory, or a loader process is killed.
        Interrupted
            After SIGINT or SIGTERM, when the state is saved.
        """
        with self._signals(), _loader_deaths(self._config), _fastest_convolutions(self._seat.device):
            return self._run()

    def _run(self) -> tuple[Trainer, Pace]:
        config, seat = self._config, self._seat
        trainer = Trainer(config, self._material.standardisations, device=seat.device)
        self._resume(trainer)
        record = TrainingRecord(self._output, config, images=trainer.images, active=seat.rank == 0)
        images = TrainingImages(self._source(self._material.volumes, augment=True), config)
        held_out = None
        if self._material.held_out:
            held_out = TrainingImages(self._source(self._material.held_out, augment=False), config, augment=False)
        log.info(
            "train-ddpm: %d cases, %d images to go on %s, %s", len(self._material.volumes),
            max(0, config.total_images - trainer.images), seat.device, trainer.precision,
        )  # fmt: skip
        shown = self._execution if seat.rank == 0 else dataclasses.replace(self._execution, quiet=True)
        began, first = time.perf_counter(), trainer.images
        with progress("train-ddpm", config.total_images, shown, done=trainer.images, unit="images") as advance:
            for batch in self._batches(images, trainer.images):
                before = trainer.images
                result = self._step(trainer, batch)
                if before == first:  # the first step compiles, fills caches and starts loaders
                    began = time.perf_counter()
                advance(trainer.images - before, f"loss {result.values['total']:.4f}")
                done = trainer.images >= config.total_images
                if done or _crossed(before, trainer.images, config.log_images):
                    self._log(trainer, record, result)
                milestone = done or _crossed(before, trainer.images, config.checkpoint_images)
                if milestone and held_out is not None:
                    record.add(trainer.images, self._judge(trainer, held_out))
                if self._previews and (done or _crossed(before, trainer.images, config.preview_images)):
                    record.preview(trainer)
                stop = self._should_stop()
                if milestone or stop:
                    self._save(trainer, record)
                if stop and not done:
                    if seat.size > 1:  # the first process that leaves ends the others: let rank 0 have saved
                        torch.distributed.barrier()
                    raise Interrupted(
                        f"stopped after {trainer.images} images; run the same command again to go on",
                        signal_number=stop,
                    )
        record.finish()
        return trainer, Pace(max(0, trainer.images - first - config.batch_size), time.perf_counter() - began)

    @property
    def _previews(self) -> bool:
        """Whether pictures are drawn: eighty passes of one image by rank 0, while the others wait (RELIABILITY 58).

        That is seconds on a GPU; several processes on CPUs would wait for minutes, and are spared.
        """
        alone = self._seat.size == 1 or self._seat.device.startswith("cuda")
        return bool(self._config.preview_images) and alone

    def _source(self, volumes: Sequence[Path], *, augment: bool) -> PatchSource:
        config = self._config
        cache = _cache_bytes(config, local_processes(self._seat.size))
        return PatchSource(
            volumes,
            size=config.patch_size,
            halo=teacher_halo(config),
            seed=config.seed,
            flips=config.flips and augment,
            turns=config.axial_turns and augment,
            cache_bytes=cache if augment else 0,  # few patches of the held-out volumes are read, always the same
            limits=config.hu_window == "8-bit",
        )

    def _batches(self, images: TrainingImages, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of each batch, from image ``start`` on: rank r takes images r, r + size, ..."""
        config, seat = self._config, self._seat
        # whole batches: the last one may run past total_images, as its size is what the step was tuned for
        total = -(-config.total_images // config.batch_size) * config.batch_size
        order = range(start + seat.rank, total, seat.size)
        yield from DataLoader(
            images,
            batch_size=config.batch_size // seat.size,
            sampler=order,
            num_workers=config.workers,
            worker_init_fn=_ignore_signals,
            drop_last=False,
            persistent_workers=False,
            pin_memory=seat.device.startswith("cuda"),
        )

    def _step(self, trainer: Trainer, batch: dict[str, torch.Tensor]) -> StepResult:
        config = self._config
        try:
            return trainer.step(batch, num_images=config.batch_size)
        except torch.cuda.OutOfMemoryError as error:
            raise ResourceError(
                f"{self._seat.device} is out of memory with --batch-size {config.batch_size}, --accumulate "
                f"{config.accumulate} and --patch-size {','.join(map(str, config.patch_size))}: try --accumulate "
                f"{2 * config.accumulate} in a new run, a smaller --batch-size, --preset small, or more --gpus"
            ) from error

    def _log(self, trainer: Trainer, record: TrainingRecord, result: StepResult) -> None:
        values = self._mean(result.values)
        if self._seat.rank == 0:
            if result.embeddings is not None and len(result.embeddings) >= MIN_RANK_TOKENS and not result.skipped:
                values["effective_rank"] = effective_rank(result.embeddings.double().cpu().numpy())
            record.add(trainer.images, values)
            log.info(
                "train-ddpm: %d/%d images, diffusion loss %.4f%s", trainer.images, self._config.total_images,
                values["diffusion"], f", contrast {values['contrast']:.3f}" if "contrast" in values else "",
            )  # fmt: skip

    def _judge(self, trainer: Trainer, held_out: TrainingImages) -> dict[str, float]:
        """Losses of fixed patches of held-out patients at fixed noise, shared by all processes."""
        config, seat = self._config, self._seat
        share = config.batch_size // seat.size // config.accumulate
        each = share * seat.size  # images a round
        rounds = -(-config.held_out_images // each)
        sums: dict[str, float] = {}
        for number in range(rounds):
            mine = range(number * each + seat.rank, (number + 1) * each, seat.size)
            batch = default_collate([held_out[HELD_OUT_FIRST + i] for i in mine])
            for name, value in trainer.judge(batch).items():
                sums[name] = sums.get(name, 0.0) + value / rounds
        return {f"held_out_{name}": value for name, value in self._mean(sums).items()}

    def _mean(self, values: dict[str, float]) -> dict[str, float]:
        """Mean over processes, which all have the same keys."""
        if self._seat.size == 1:
            return dict(values)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self._seat.device)
        torch.distributed.all_reduce(numbers)
        return dict(zip(values, (numbers / self._seat.size).tolist(), strict=True))

    def _resume(self, trainer: Trainer) -> None:
        """Continue from the newest checkpoint that loads."""
        paths = sorted(self._output.glob("checkpoint-*.pt"), reverse=True)
        for path in paths:
            try:
                trainer.load_state_dict(load_training_state(path))
                log.info("train-ddpm: resuming from %s", path.name)
                return
            except (StoreError, KeyError, RuntimeError, ValueError) as error:
                log.warning("train-ddpm: %s cannot be used (%s); trying the one before", path.name, error)
        if paths:
            raise StoreError(
                f"none of {len(paths)} checkpoints in {self._output} can be loaded; use a new output folder"
            )
        log.info("train-ddpm: no checkpoint in %s, starting from the beginning", self._output)

    def _save(self, trainer: Trainer, record: TrainingRecord) -> None:
        if self._seat.rank != 0:
            return
        record.write()
        save_training_state(self._output / f"checkpoint-{trainer.images:010d}.pt", trainer.state_dict())
        for old in sorted(self._output.glob("checkpoint-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def _should_stop(self) -> int:
        """Number of the signal any rank received, 0 if none: all ranks stop at the same step."""
        if self._seat.size == 1:
            return self._stop_signal
        flag = torch.tensor(self._stop_signal, device=self._seat.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Finish the step and save at the first signal; the second one stops at once.

        Of several processes each gets a signal twice, from the sender to the group and from the launcher: there the
        second is ignored.
        """

        def remember(number: int, frame: Any) -> None:
            if self._stop_signal:
                if self._seat.size == 1:
                    raise KeyboardInterrupt
                return
            self._stop_signal = number
            if self._seat.rank == 0:
                again = "; once more to stop at once" if self._seat.size == 1 else ""
                log.warning("train-ddpm: stopping after this step%s", again)

        try:
            before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: Python delivers no signals here
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _crossed(before: int, after: int, step: int) -> bool:
    """Whether a multiple of ``step`` lies in (before, after]."""
    return after // step > before // step


@contextmanager
def _loader_deaths(config: TrainConfig) -> Iterator[None]:
    """Say what to do when a loader process is killed, which torch reports as a RuntimeError at any place."""
    try:
        yield
    except RuntimeError as error:
        if not _WORKER_DIED.search(str(error)):
            raise
        raise ResourceError(
            f"a loader process died, most likely for lack of memory ({error}): lower --workers (now "
            f"{config.workers}) or --cache-gib (now {config.cache_gib:g}) and run the same command again"
        ) from error


@contextmanager
def _fastest_convolutions(device: str) -> Iterator[None]:
    """On CUDA let cuDNN try its algorithms once: all batches have one shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.startswith("cuda")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _ignore_signals(worker: int) -> None:
    """Loader processes end with their trainer: a signal to the whole group must not take them from it before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _cache_bytes(config: TrainConfig, processes: int) -> int:
    """Share of ``--cache-gib`` of one loader process, ``processes`` training processes being on this machine."""
    return int(config.cache_gib * 2**30 / (processes * max(1, config.workers)))
