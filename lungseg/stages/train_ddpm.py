"""``lungseg train-ddpm``: the run as a folder, its checkpoints, and what happens when it is stopped.

The same command again resumes. One code path for one and many devices: ``gpus`` starts torch's own launcher, and
under torchrun the given world is joined.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lungseg import __version__
from lungseg.config.execution import Execution, resolve_device
from lungseg.config.fields import to_dict
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import load_training_state, save_model, save_training_state
from lungseg.diffusion.training import Trainer, TrainingImages, teacher_halo
from lungseg.errors import Interrupted, LungsegError, MismatchError, ResourceError, StoreError, UsageError
from lungseg.radiomics.descriptor import FEATURE_NAMES, Standardisation
from lungseg.stages.cohort import StageResult, limited_threads
from lungseg.stages.extract_radiomics import load_standardisation, training_cases
from lungseg.stages.progress import progress
from lungseg.store.atomic import PARTIAL, canonical_json, read_json, write_json, write_text
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.patches import PatchSource
from lungseg.store.schema import check_current

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2


def train_ddpm(
    store: Store | Path | str,
    output: Path,
    config: TrainConfig = TrainConfig(),
    *,
    execution: Execution = Execution(),
) -> StageResult:
    """Train a diffusion model on the training cases of a store.

    ``output`` becomes a run folder: ``config.json``, ``stats.jsonl``, ``checkpoint-<images>.pt`` (the last two) and,
    when done, ``model.safetensors``. A finished run is left as it is.

    Raises
    ------
    InputError
        If the store has no training case, or no standardisation of the teacher's window.
    MismatchError
        If the run was begun with other settings or data, or training diverges.
    ResourceError
        If the device runs out of memory.
    Interrupted
        After SIGINT or SIGTERM, when the state is saved.
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    output = Path(output)
    if execution.gpus > 1 and "RANK" not in os.environ:
        return _launch(store.path, output, config, execution)
    with _world(execution) as (rank, size, device):
        if config.batch_size % size:
            raise UsageError(f"--batch-size {config.batch_size} cannot be shared equally by {size} processes")
        run = _Run(store, output, config, rank=rank, size=size, device=device, execution=execution)
        return run.train()


class _Run:
    """One process of a training run."""

    def __init__(
        self,
        store: Store,
        output: Path,
        config: TrainConfig,
        *,
        rank: int,
        size: int,
        device: str,
        execution: Execution,
    ) -> None:
        self.store, self.output, self.config = store, output, config
        self.rank, self.size, self.device, self.execution = rank, size, device, execution
        self.stop_signal = 0

    def train(self) -> StageResult:
        self.output.mkdir(parents=True, exist_ok=True)
        with _maybe_lock(self.output / "train.lock", self.rank), limited_threads(self.execution.threads):
            header = self._header()
            known = (self.output / "config.json").exists()
            if known:
                check_current(
                    read_json(self.output / "config.json"), header, what=f"run {self.output}",
                    overwrite_hint="another output folder",
                )  # fmt: skip
            model_path = self.output / "model.safetensors"
            if model_path.exists():
                return StageResult("train-ddpm", self.output, notes=(f"already complete: {model_path}",))
            if self.rank == 0:
                self._clean()
                if not known:
                    write_json(self.output / "config.json", header)
            with self._signals():
                trainer = self._loop()
            if self.rank == 0:
                card = self._card(header, trainer)
                # how the run was fed is no property of the model
                config = dataclasses.replace(self.config, workers=0, cache_gib=TrainConfig().cache_gib)
                save_model(model_path, trainer.student_weights(), config=config, card=card)
            notes = (f"model: {model_path} ({trainer.images} images, {trainer.skipped} steps skipped)",)
            return StageResult("train-ddpm", self.output, notes=notes, values={"images": trainer.images})

    def _header(self) -> dict[str, Any]:
        inputs = {}
        listed = tuple(self.store.header["config"]["patch_size"])
        if listed != self.config.patch_size:
            raise MismatchError(
                f"store {self.store.path} lists patches of {listed} voxels, training wants {self.config.patch_size}: "
                "use the same --preset (or --patch-size) in both commands"
            )
        self.case_ids = training_cases(self.store, self.store.require_cases())
        for case_id in self.case_ids:
            with self.store.open(case_id, "volume") as volume:
                inputs[case_id] = volume.fingerprint
                spacing = volume.provenance["grid"]["spacing_mm"][0]
        self.standardisation = self._standardisation()
        return {
            "format": "lungseg-run",
            "lungseg_version": __version__,
            # how a run is fed does not change what it learns
            "config": {k: v for k, v in to_dict(self.config).items() if k not in ("workers", "cache_gib")},
            "inputs": inputs,
            "spacing_mm": spacing,
            "environment": {"torch": torch.__version__, "threads": self.execution.threads, "processes": self.size},
        }

    def _standardisation(self) -> Standardisation | None:
        """Statistics of the teacher's windows."""
        config = self.config
        if config.distill == "none":
            return None
        size = config.patch_size if config.distill == "patches" else (config.teacher_window,) * 3
        return load_standardisation(self.store, size)

    def _clean(self) -> None:
        """Remove what a killed run left half written."""
        for path in self.output.glob(f"*{PARTIAL}"):
            path.unlink()

    def _loop(self) -> Trainer:
        config = self.config
        trainer = Trainer(config, self.standardisation, device=self.device)
        self._resume(trainer)
        source = PatchSource(
            [self.store.case_file(case_id, "volume") for case_id in self.case_ids],
            size=config.patch_size,
            halo=teacher_halo(config),
            seed=config.seed,
            flips=config.flips,
            cache_bytes=int(config.cache_gib * 2**30),
        )
        lines = self._stats_until(trainer.images)
        log.info(
            "train-ddpm: %d cases, %d images to go on %s, %s", len(source), config.total_images - trainer.images,
            self.device, trainer.precision,
        )  # fmt: skip
        shown = self.execution if self.rank == 0 else dataclasses.replace(self.execution, quiet=True)
        with progress("train-ddpm", config.total_images, shown, done=trainer.images, unit="images") as advance:
            for batch in self._batches(TrainingImages(source, config), trainer.images):
                before = trainer.images
                step = self._step(trainer, batch)
                advance(trainer.images - before, f"loss {step['total']:.4f}")
                if _crossed(before, trainer.images, config.log_images) or trainer.images >= config.total_images:
                    lines.append(_stats_line(trainer.images, step))
                    self._report(trainer, step)
                done = trainer.images >= config.total_images
                stop = self._should_stop()
                if done or stop or _crossed(before, trainer.images, config.checkpoint_images):
                    self._save(trainer, lines)
                if stop and not done:
                    raise Interrupted(
                        f"stopped after {trainer.images} images; run the same command again to go on",
                        signal_number=stop,
                    )
        return trainer

    def _batches(self, images: TrainingImages, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's share of each batch, from image ``start`` on: rank r takes rows r, r + size, ..."""
        config = self.config
        # whole batches: the last one may run past total_images, as its size is what the step was tuned for
        total = -(-config.total_images // config.batch_size) * config.batch_size
        order = range(start + self.rank, total, self.size)
        yield from torch.utils.data.DataLoader(
            images,
            batch_size=config.batch_size // self.size,
            sampler=order,
            num_workers=config.workers,
            drop_last=False,
            persistent_workers=False,
            pin_memory=self.device.startswith("cuda"),
        )

    def _step(self, trainer: Trainer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        try:
            return trainer.step(batch, num_images=self.config.batch_size).values
        except torch.cuda.OutOfMemoryError as error:
            raise ResourceError(
                f"{self.device} is out of memory with --batch-size {self.config.batch_size} and --patch-size "
                f"{self.config.patch_size}: lower one of them, use --preset small, or more --gpus"
            ) from error

    def _report(self, trainer: Trainer, step: dict[str, float]) -> None:
        if self.rank == 0:
            log.info(
                "train-ddpm: %d/%d images, diffusion loss %.4f%s", trainer.images, self.config.total_images,
                step["diffusion"], f", contrast {step['contrast']:.3f}" if "contrast" in step else "",
            )  # fmt: skip

    def _resume(self, trainer: Trainer) -> None:
        """Continue from the newest checkpoint that loads."""
        paths = sorted(self.output.glob("checkpoint-*.pt"), reverse=True)
        for path in paths:
            try:
                trainer.load_state_dict(load_training_state(path))
                log.info("train-ddpm: resuming from %s", path.name)
                return
            except (StoreError, KeyError, RuntimeError) as error:
                log.warning("train-ddpm: %s cannot be used (%s); trying the one before", path.name, error)
        if paths:
            raise StoreError(
                f"none of {len(paths)} checkpoints in {self.output} can be loaded; use a new output folder"
            )

    def _stats_until(self, images: int) -> list[str]:
        """Lines of stats.jsonl up to the checkpoint resumed from; later ones will be made again."""
        path = self.output / "stats.jsonl"
        if not path.exists():
            return []
        return [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["images"] <= images]

    def _save(self, trainer: Trainer, lines: Sequence[str]) -> None:
        if self.rank != 0:
            return
        write_text(self.output / "stats.jsonl", "".join(line + "\n" for line in lines))
        save_training_state(self.output / f"checkpoint-{trainer.images:010d}.pt", trainer.state_dict())
        for old in sorted(self.output.glob("checkpoint-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def _should_stop(self) -> int:
        """Number of the signal any rank received, 0 if none: all ranks stop at the same step."""
        if self.size == 1:
            return self.stop_signal
        flag = torch.tensor(self.stop_signal, device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Finish the step and save at the first signal; the second one stops at once."""

        def remember(number: int, frame: Any) -> None:
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = number
            log.warning("train-ddpm: stopping after this step; once more to stop at once")

        try:
            before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: Python delivers no signals here
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _card(self, header: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
        return {
            "images": trainer.images,
            "skipped_steps": trainer.skipped,
            "num_cases": len(self.case_ids),
            "num_features": len(FEATURE_NAMES),
            "spacing_mm": header["spacing_mm"],
            "training_volumes": header["inputs"],
            "environment": header["environment"],
            "standardisation": self.standardisation.to_dict() if self.standardisation else None,
            "intended_use": "research only",
        }


def _crossed(before: int, after: int, step: int) -> bool:
    """Whether a multiple of ``step`` lies in (before, after]."""
    return after // step > before // step


def _stats_line(images: int, values: dict[str, float]) -> str:
    """One line of stats.jsonl: no times, so that the same run gives the same bytes."""
    finite = {key: value if value == value and abs(value) != float("inf") else None for key, value in values.items()}
    return canonical_json({"images": images, **finite})


@contextmanager
def _maybe_lock(path: Path, rank: int) -> Iterator[None]:
    if rank == 0:
        with lock(path):
            yield
    else:
        yield


@contextmanager
def _world(execution: Execution) -> Iterator[tuple[int, int, str]]:
    """(rank, number of processes, device) of this process; joins the group of a launcher where there is one."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = resolve_device(execution.device)
    if size == 1:
        yield 0, 1, device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield rank, size, device
    finally:
        torch.distributed.destroy_process_group()


def _launch(store: Path, output: Path, config: TrainConfig, execution: Execution) -> StageResult:
    """Start one process per device with torch's elastic launcher and wait for them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    device = resolve_device(execution.device)
    if device.startswith("cuda") and execution.gpus > torch.cuda.device_count():
        raise UsageError(f"--gpus {execution.gpus}: this machine has {torch.cuda.device_count()} CUDA devices")
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=execution.gpus,
        run_id="lungseg",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=1,
        start_method="spawn",
    )
    try:
        results = elastic_launch(launch, _entry)(store, output, config, dataclasses.replace(execution, gpus=0))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise MismatchError(f"training process {rank} failed: {failure.message}") from error
    outcome = results[0]
    if isinstance(outcome, StageResult):
        return outcome
    code, text = outcome
    if code >= 128:
        raise Interrupted(text, signal_number=code - 128)
    failed = LungsegError(text)
    failed.exit_code = code
    raise failed


def _entry(store: Path, output: Path, config: TrainConfig, execution: Execution) -> Any:
    """What each launched process runs. An error becomes a value: an exception would reach the parent as text only."""
    if int(os.environ["RANK"]) == 0 and not execution.quiet:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return train_ddpm(store, output, config, execution=execution)
    except LungsegError as error:
        return error.exit_code, str(error)
