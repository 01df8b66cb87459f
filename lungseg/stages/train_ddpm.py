"""``lungseg train-ddpm``: the run as a folder, its checkpoints, and what happens when it is stopped.

The same command again resumes. One code path for one and many devices: ``gpus`` starts torch's own launcher, and
under torchrun the given world is joined.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lungseg import __version__
from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import read_model_file, save_model
from lungseg.diffusion.footprint import footprint
from lungseg.diffusion.training import Trainer
from lungseg.errors import InputError, LungsegError, MismatchError, UsageError
from lungseg.radiomics.descriptor import Standardisation
from lungseg.stages.cohort import StageResult, limited_threads
from lungseg.stages.extract_radiomics import check_standardisation, find_training_cases, load_standardisation
from lungseg.stages.launch import as_error, launch, remove_errors, world
from lungseg.stages.training_cases import MIN_PATIENTS, held_out_cases, patients_of
from lungseg.stages.training_estimate import advice, summary
from lungseg.stages.training_loop import Material, Seat, TrainingLoop
from lungseg.stages.training_summary import summarised
from lungseg.store.atomic import PARTIAL, canonical_json, disk_errors, read_json, write_json
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.schema import check_current

log = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
_NOT_LEARNED = ("workers", "cache_gib", "tensorboard")
"""Settings of how a run is fed and watched: they do not change what it learns."""


def train_ddpm(
    store: Store | Path | str,
    output: Path,
    config: TrainConfig = TrainConfig(),
    *,
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Train a diffusion model on the training cases of a store.

    ``output`` becomes a run folder: ``config.json``, ``stats.jsonl``, ``checkpoint-<images>.pt`` (the last two) and,
    when done, ``model.safetensors``. A finished run is left as it is. With ``as_json`` the result's document holds the
    first and last figures of the run.

    Raises
    ------
    InputError
        If the store has no training case, or no standardisation of the teacher's window, or ``output`` is a file.
    MismatchError
        If the run was begun with other settings, data or standardisation, its model was replaced by one for features,
        the standardisation belongs to other volumes or features, the cases differ in spacing, or training diverges.
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
        return summarised(result, as_json=as_json)
    with world(execution) as (rank, size, device):
        _check_shares(config, size)
        result = _Run(store, output, config, seat=Seat(rank, size, device), execution=execution).train()
        return summarised(result, as_json=as_json)


def _make_folder(output: Path) -> None:
    with disk_errors(output):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{output} is a file, or lies below one; give the run folder another name") from error


def _check_shares(config: TrainConfig, size: int) -> None:
    if config.batch_size % (size * config.accumulate):
        parts = f" in --accumulate {config.accumulate} parts" if config.accumulate > 1 else ""
        raise UsageError(f"--batch-size {config.batch_size} cannot be shared equally by {size} processes{parts}")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What rank 0 found when it checked the run, the same for all ranks."""

    header: dict[str, Any]
    case_ids: list[str]
    """Trained on."""
    held_out: list[str]
    """Never trained on."""
    standardisations: tuple[Standardisation, ...]
    complete: bool
    """`model.safetensors` is there already."""


class _Run:
    """One process of a training run."""

    def __init__(self, store: Store, output: Path, config: TrainConfig, *, seat: Seat, execution: Execution) -> None:
        self.store, self.output, self.config = store, output, config
        self.seat, self.execution = seat, execution

    def train(self) -> StageResult:
        with ExitStack() as held, limited_threads(self.execution.threads):
            self.plan = self._agreed(lambda: self._prepare(held))
            model_path = self.output / MODEL_FILE
            if self.plan.complete:
                return StageResult("train-ddpm", self.output, notes=(f"already complete: {model_path}",))
            trainer, pace = TrainingLoop(self.output, self.config, self._material(), self.seat, self.execution).run()
            if self.seat.rank == 0:
                unfed = {name: getattr(TrainConfig(), name) for name in _NOT_LEARNED}
                config = dataclasses.replace(self.config, **unfed)
                save_model(model_path, trainer.student_weights(), config=config, card=self._card(trainer))
            notes = (
                f"model: {model_path} ({trainer.images} images, {trainer.skipped} steps skipped)",
                summary(trainer, pace, self.seat),
            )
            values = {"images": trainer.images, "images_a_second": pace.images_a_second}
            return StageResult("train-ddpm", self.output, notes=notes, values=values)

    def _material(self) -> Material:
        def paths(case_ids: Sequence[str]) -> tuple[Path, ...]:
            return tuple(self.store.case_file(case_id, "volume") for case_id in case_ids)

        return Material(paths(self.plan.case_ids), paths(self.plan.held_out), self.plan.standardisations)

    def _agreed(self, work: Callable[[], _Plan]) -> _Plan:
        """What rank 0 makes of ``work``, on all ranks: its result, or its error."""
        if self.seat.size == 1:
            return work()
        verdict: list[Any] = [None]
        if self.seat.rank == 0:
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
        if plan.complete:
            _check_whole(self.output / MODEL_FILE)
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
            device = self.seat.device
            cost = footprint(self.config, device.partition(":")[0])
            too_much = advice(self.config, cost, device=device, size=self.seat.size)
            if too_much:
                log.warning("train-ddpm: this %s", too_much)
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
        all_ids = list(found.fingerprints)
        inputs = dict(found.fingerprints)
        store.check_uniform(all_ids)
        with store.open(all_ids[0], "volume") as volume:
            spacing = volume.provenance["grid"]["spacing_mm"][0]
        held_out = held_out_cases(patients_of(store, all_ids), config.held_out)
        if config.held_out and not held_out:
            log.info("train-ddpm: fewer than %d patients: none is held out, there is no held-out loss", MIN_PATIENTS)
        standardisations = []
        for size in _teacher_sizes(config):
            standardisation = load_standardisation(store, size)
            check_standardisation(store, standardisation, cases=found, mcc=config.mcc)
            standardisations.append(standardisation)
        if standardisations:
            # of one window as it always was, so that its runs go on
            plain = [standardisation.to_dict() for standardisation in standardisations]
            text = canonical_json(plain[0] if len(plain) == 1 else plain)
            inputs["standardisation"] = hashlib.sha256(text.encode()).hexdigest()
        header = {
            "format": "lungseg-run",
            "lungseg_version": __version__,
            "config": {k: v for k, v in to_dict(config).items() if k not in _NOT_LEARNED},
            "inputs": inputs,
            "held_out": held_out,
            "spacing_mm": spacing,
            "environment": {"torch": torch.__version__, "threads": self.execution.threads, "processes": self.seat.size},
        }
        case_ids = [case_id for case_id in all_ids if case_id not in held_out]
        complete = (self.output / MODEL_FILE).exists()
        return _Plan(header, case_ids, held_out, tuple(standardisations), complete)

    def _clean(self) -> None:
        """Remove what a killed run left half written."""
        for path in self.output.glob(f"*{PARTIAL}"):
            path.unlink()
        if self.seat.size == 1:  # a launcher has done it before its processes began
            remove_errors(self.output)

    def _card(self, trainer: Trainer) -> dict[str, Any]:
        header = self.plan.header
        return {
            "images": trainer.images,
            "skipped_steps": trainer.skipped,
            "num_cases": len(self.plan.case_ids),
            "num_features": trainer.model.num_features,
            "spacing_mm": header["spacing_mm"],
            # this file is shared: which volumes by fingerprint, but not their ids
            "training_volumes": sorted(header["inputs"][case_id] for case_id in self.plan.case_ids),
            "environment": header["environment"],
            "standardisation": [standardisation.to_dict() for standardisation in self.plan.standardisations],
            "intended_use": "research only",
        }


def _check_whole(path: Path) -> None:
    """Refuse a run folder whose model is not what training left there, but what was exported from it."""
    if not read_model_file(path)[0].get("decoder", True):
        raise MismatchError(
            f"{path} was exported for features and has no decoder: it is not the result of this training, which goes "
            "on from checkpoint-*.pt alone. Take it away, or give another folder with -o"
        )


def _teacher_sizes(config: TrainConfig) -> list[tuple[int, int, int]]:
    """Windows (z, y, x) the teacher describes."""
    if config.distill == "tokens":
        return [(window, window, window) for window in config.teacher_windows]
    return [config.patch_size] if config.distill == "patches" else []
