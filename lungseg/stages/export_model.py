"""``lungseg export-model``: a trained model as the small file that is shared, with its model card."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lungseg.config.execution import Execution
from lungseg.config.export_model import ExportModelConfig
from lungseg.config.fields import flag_name
from lungseg.config.presets import DEFAULT_PRESET, PRESETS, make_config
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import Student, load_student, read_model_file, save_model
from lungseg.diffusion.sharing import half_precision, without_decoder
from lungseg.errors import InputError, MismatchError, UsageError
from lungseg.stages.cohort import StageResult
from lungseg.stages.fits import find_model
from lungseg.store.atomic import write_bytes

CARD_FIELDS = ("name", "data", "seeds", "licence", "limits", "figures")
"""What a model card says that the model does not know itself; `figures` is a table, the others are text."""
INTENDED_USE = "research use only; not a medical device"
WATCHED = ("held_out_diffusion", "held_out_regression", "effective_rank")
"""Figures of the training that go into the card."""
TRAINING_ONLY = ("workers", "cache_gib", "tensorboard")
"""Settings that a model does not keep."""


def export_model(
    model: Path | str,
    output: Path,
    config: ExportModelConfig = ExportModelConfig(),
    *,
    card: Path | None = None,
    execution: Execution = Execution(),
) -> StageResult:
    """Write a model as one self-describing file for people to use: safetensors, no pickle.

    By default without the decoder and in half precision, which is a sixth of the size; ``cluster``, ``probe`` and
    ``run`` take it like any model. A bundle keeps its fit. The same input gives the same bytes.

    Parameters
    ----------
    model : path
        Training run, ``model.safetensors``, or bundle.
    output : path
        File to write.
    config : ExportModelConfig
    card : path, optional
        TOML file with any of ``CARD_FIELDS``. The training's command, images, cases, volumes (by fingerprint) and last
        figures are always in the card, and so is the intended use.

    Raises
    ------
    UsageError
        If ``output`` is the model itself, or holds something else and ``execution.overwrite`` is off.
    InputError
        If the card cannot be read or says something unknown.
    MismatchError
        If the decoder is asked for and the model has none, a weight does not fit half precision, or a bundle's fit
        belongs to another model.
    """
    source, output = find_model(Path(model)), Path(output)
    if output.exists() and output.samefile(source):
        raise UsageError(f"{output} is the model itself, which training cannot give back: give another name with -o")
    written = _read_card(Path(card)) if card is not None else {}
    student = load_student(source)
    metadata, tensors = read_model_file(source)
    weights = {name: t for name, t in tensors.items() if name.startswith(("unet.", "head."))}
    if config.decoder:
        student.require_decoder("--decoder")
    else:
        weights = without_decoder(weights)
    if config.precision == "fp16":
        weights = half_precision(weights)
    facts = {
        **student.card,
        "command": training_command(student.config),
        "intended_use": INTENDED_USE,
        "precision": config.precision,
        "training_figures": _last_figures(source.parent / "stats.jsonl"),
        "exported_from": student.fingerprint,
        **written,
    }
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.safetensors"
        save_model(made, weights, config=student.config, card=facts)
        exported = load_student(made)
        if metadata["extra"]:
            fit = {name: t for name, t in tensors.items() if name.startswith("fit.")}
            extra = _fit_of(metadata["extra"], student, exported, source)
            save_model(made, weights, config=student.config, card=facts, extra_tensors=fit, extra=extra)
        content = made.read_bytes()
    if output.exists() and output.read_bytes() != content and not execution.overwrite:
        raise UsageError(f"{output} holds something else: give another name, or --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, content)
    change = token_change(student, exported)
    notes = [
        f"model: {output} ({len(content) / 1e6:.2f} MB, {sum(t.numel() for t in weights.values()):,} parameters)",
        f"tokens differ from the model's by {change:.1e} at most (unit vectors, patches of noise)",
    ]
    missing = [name for name in CARD_FIELDS if name not in facts]
    if missing:
        notes.append(f"its model card does not state {', '.join(missing)}: give them with --card FILE.toml")
    return StageResult("export-model", output, notes=tuple(notes), values={"bytes": len(content), "change": change})


def _last_figures(path: Path) -> dict[str, float]:
    """The last of each of ``WATCHED`` in the figures of a training run; of a model without its run none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    figures: dict[str, float] = {}
    for line in lines:
        figures.update({name: value for name, value in json.loads(line).items() if name in WATCHED})
    return figures


def _read_card(path: Path) -> dict[str, Any]:
    """What people say of a model, checked."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the model card {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"the model card {path} is no TOML file: {error}") from error
    unknown = [name for name in said if name not in CARD_FIELDS]
    if unknown:
        raise InputError(f"the model card {path} states {', '.join(unknown)}; it may state {', '.join(CARD_FIELDS)}")
    for name, value in said.items():
        plain = isinstance(value, str)
        if name == "figures":
            plain = isinstance(value, dict) and all(isinstance(v, (str, int, float)) for v in value.values())
        if not plain:
            kind = "a table of numbers and texts" if name == "figures" else "a text"
            raise InputError(f"the model card {path}: {name} must be {kind}")
    return said


def _fit_of(extra: Mapping[str, Any], student: Student, exported: Student, source: Path) -> dict[str, Any]:
    """Description of a bundle's fit, which now belongs to the exported model."""
    provenance = extra["provenance"]
    if provenance["inputs"].get("model") != student.fingerprint:
        raise MismatchError(f"the fit in {source} belongs to another model than the one beside it")
    inputs = {**provenance["inputs"], "model": exported.fingerprint}
    return {**extra, "provenance": {**provenance, "inputs": inputs}}


def training_command(config: TrainConfig) -> str:
    """The command that trains with these settings: the nearest preset, and what differs from it."""

    def changes(preset: str) -> dict[str, Any]:
        base = make_config(TrainConfig, preset=preset)
        names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in TRAINING_ONLY]
        return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(base, name)}

    preset = min(PRESETS, key=lambda name: (len(changes(name)), name != DEFAULT_PRESET))
    words = ["lungseg train-ddpm STORE -o RUN", *([] if preset == DEFAULT_PRESET else [f"--preset {preset}"])]
    for name, value in changes(preset).items():
        flag = flag_name(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{name.replace('_', '-')}")
        else:
            words.append(f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)


@torch.no_grad()
def token_change(student: Student, other: Student) -> float:
    """Largest difference of any channel of the tokens two models make of the same patches of noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, *student.config.patch_size, generator=generator)
    x[:, 1] = 1.0  # all lung
    times = torch.tensor([0, student.schedule.num_steps // 10])
    pairs = [one.embed(one.unet.encode(x, times).movedim(1, -1).flatten(0, -2)) for one in (student, other)]
    return float((pairs[0] - pairs[1]).abs().max())
