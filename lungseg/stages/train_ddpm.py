"""``lungseg train-ddpm``: the run as a folder, its checkpoints, and what happens when it is stopped.

The same command again resumes. One code path for one and many devices: ``gpus`` starts torch's own launcher, and
under torchrun the given world is joined.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lungseg import __version__
from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import load_training_state, save_model, save_training_state
from lungseg.diffusion.training import Trainer, TrainingImages, teacher_halo
from lungseg.errors import InputError, Interrupted, LungsegError, MismatchError, ResourceError, StoreError, UsageError
from lungseg.radiomics.descriptor import FEATURE_NAMES, Standardisation
from lungseg.stages.cohort import StageResult, limited_threads
from lungseg.stages.extract_radiomics import check_standardisation, find_training_cases, load_standardisation
from lungseg.stages.launch import as_error, launch, local_processes, remove_errors, world
from lungseg.stages.progress import progress
from lungseg.store.atomic import PARTIAL, canonical_json, disk_errors, read_json, write_json, write_text
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.patches import PatchSource
from lungseg.store.schema import check_current

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
_NOT_LEARNED = ("workers", "cache_gib", "gradient_checkpointing", "compile")
"""Settings of how a run is fed: they do not change what it learns."""
_WORKER_DIED = re.compile(r"DataLoader worker \(pid.*(is killed by signal|exited unexpectedly)")


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
        If the store has no training case, or no standardisation of the teacher's window, or ``output`` is a file.
    MismatchError
        If the run was begun with other settings, data or standardisation, the standardisation belongs to other
        volumes or features, the cases differ in spacing, or training diverges.
    ResourceError
        If the device runs out of memory, or a loader process is killed.
    Interrupted
        After SIGINT or SIGTERM, when the state is saved.
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    output = Path(output)
    _make_folder(output)
    if execution.gpus > 1 and "RANK" not in os.environ:
        _check_shares(config, execution.gpus)
        result: StageResult = launch(train_ddpm, store.path, output, config, folder=output, execution=execution)
        return result
    with world(execution) as (rank, size, device):
        _check_shares(config, size)
        run = _Run(store, output, config, rank=rank, size=size, device=device, execution=execution)
        return run.train()


def _make_folder(output: Path) -> None:
    with disk_errors(output):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{output} is a file, or lies below one; give the run folder another name") from error


def _check_shares(config: TrainConfig, size: int) -> None:
    if config.batch_size % size:
        raise UsageError(f"--batch-size {config.batch_size} cannot be shared equally by {size} processes")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What rank 0 found when it checked the run, the same for all ranks."""

    header: dict[str, Any]
    case_ids: list[str]
    standardisation: Standardisation | None
    complete: bool
    """`model.safetensors` is there already."""


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
        with ExitStack() as held, limited_threads(self.execution.threads):
            self.plan = self._agreed(lambda: self._prepare(held))
            model_path = self.output / "model.safetensors"
            if self.plan.complete:
                return StageResult("train-ddpm", self.output, notes=(f"already complete: {model_path}",))
            with self._signals(), _loader_deaths(self.config):
                trainer = self._loop()
            if self.rank == 0:
                unfed = {name: getattr(TrainConfig(), name) for name in _NOT_LEARNED}
                config = dataclasses.replace(self.config, **unfed)
                save_model(model_path, trainer.student_weights(), config=config, card=self._card(trainer))
            notes = (f"model: {model_path} ({trainer.images} images, {trainer.skipped} steps skipped)",)
            return StageResult("train-ddpm", self.output, notes=notes, values={"images": trainer.images})

    def _agreed(self, work: Callable[[], _Plan]) -> _Plan:
        """What rank 0 makes of ``work``, on all ranks: its result, or its error."""
        if self.size == 1:
            return work()
        verdict: list[Any] = [None]
        if self.rank == 0:
            try:
                verdict = [work()]
            except LungsegError as error:
                verdict = [(error.exit_code, str(error))]
        torch.distributed.broadcast_object_list(verdict)
        if isinstance(verdict[0], _Plan):
            return verdict[0]
        raise as_error(*verdict[0])

    def _prepare(self, held: ExitStack) -> _Plan:
        """Lock the run for as long as ``held`` lasts, and check that it may go on with these settings and data."""
        held.enter_context(lock(self.output / "train.lock"))
        plan = self._plan()
        path = self.output / "config.json"
        known = path.exists()
        if known:
            begun = read_json(path)
            check_current(begun, plan.header, what=f"run {self.output}", overwrite_hint="another output folder")
            then, now = begun.get("environment"), plan.header["environment"]
            if then != now and not plan.complete:
                log.warning(
                    "train-ddpm: %s was begun with %s and goes on with %s: the weights will not be those of an "
                    "undisturbed run, bit for bit", self.output, canonical_json(then), canonical_json(now),
                )  # fmt: skip
        if not plan.complete:
            self._clean()
            if not known:
                write_json(path, plan.header)
        return plan

    def _plan(self) -> _Plan:
        config, store = self.config, self.store
        listed = tuple(store.header["config"]["patch_size"])
        if listed != config.patch_size:
            raise MismatchError(
                f"store {store.path} lists patches of {listed} voxels, training wants {config.patch_size}: "
                "use the same --preset (or --patch-size) in both commands"
            )
        found = find_training_cases(store, store.require_cases())
        case_ids = list(found.fingerprints)
        inputs = dict(found.fingerprints)
        store.check_uniform(case_ids)
        with store.open(case_ids[0], "volume") as volume:
            spacing = volume.provenance["grid"]["spacing_mm"][0]
        standardisation = None
        if config.distill != "none":
            size = config.patch_size if config.distill == "patches" else (config.teacher_window,) * 3
            standardisation = load_standardisation(store, size)
            check_standardisation(store, standardisation, cases=found, mcc=config.mcc)
            inputs["standardisation"] = hashlib.sha256(canonical_json(standardisation.to_dict()).encode()).hexdigest()
        header = {
            "format": "lungseg-run",
            "lungseg_version": __version__,
            "config": {k: v for k, v in to_dict(config).items() if k not in _NOT_LEARNED},
            "inputs": inputs,
            "spacing_mm": spacing,
            "environment": {"torch": torch.__version__, "threads": self.execution.threads, "processes": self.size},
        }
        return _Plan(header, case_ids, standardisation, (self.output / "model.safetensors").exists())

    def _clean(self) -> None:
        """Remove what a killed run left half written."""
        for path in self.output.glob(f"*{PARTIAL}"):
            path.unlink()
        if self.size == 1:  # a launcher has done it before its processes began
            remove_errors(self.output)

    def _loop(self) -> Trainer:
        config = self.config
        trainer = Trainer(config, self.plan.standardisation, device=self.device)
        self._resume(trainer)
        source = PatchSource(
            [self.store.case_file(case_id, "volume") for case_id in self.plan.case_ids],
            size=config.patch_size,
            halo=teacher_halo(config),
            seed=config.seed,
            flips=config.flips,
            cache_bytes=_cache_bytes(config, local_processes(self.size)),
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
                    if self.size > 1:  # the first process that leaves ends the others: let rank 0 have saved
                        torch.distributed.barrier()
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
            worker_init_fn=_ignore_signals,
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
        """Finish the step and save at the first signal; the second one stops at once.

        Of several processes each gets a signal twice, from the sender to the group and from the launcher: there the
        second is ignored.
        """

        def remember(number: int, frame: Any) -> None:
            if self.stop_signal:
                if self.size == 1:
                    raise KeyboardInterrupt
                return
            self.stop_signal = number
            if self.rank == 0:
                again = "; once more to stop at once" if self.size == 1 else ""
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

    def _card(self, trainer: Trainer) -> dict[str, Any]:
        header, standardisation = self.plan.header, self.plan.standardisation
        return {
            "images": trainer.images,
            "skipped_steps": trainer.skipped,
            "num_cases": len(self.plan.case_ids),
            "num_features": len(FEATURE_NAMES),
            "spacing_mm": header["spacing_mm"],
            # this file is shared: which volumes by fingerprint, but not their ids
            "training_volumes": sorted(header["inputs"][case_id] for case_id in self.plan.case_ids),
            "environment": header["environment"],
            "standardisation": standardisation.to_dict() if standardisation else None,
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


def _ignore_signals(worker: int) -> None:
    """Loader processes end with their trainer: a signal to the whole group must not take them from it before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _cache_bytes(config: TrainConfig, processes: int) -> int:
    """Share of ``--cache-gib`` of one loader process, ``processes`` training processes being on this machine."""
    return int(config.cache_gib * 2**30 / (processes * max(1, config.workers)))
