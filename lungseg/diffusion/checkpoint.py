"""Models and training states on disk.

``model.safetensors`` is the file people share: weights, and all that is needed to use them, as JSON in its metadata;
no pickle. ``checkpoint-<images>.pt`` is a run's own state, loaded with ``weights_only=True`` and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lungseg import __version__
from lungseg.config.fields import from_dict, to_dict
from lungseg.config.train_ddpm import TrainConfig, migrate
from lungseg.diffusion.distillation import StudentHead
from lungseg.diffusion.normalisation import HU_WINDOWS, HuWindow
from lungseg.diffusion.schedule import NoiseSchedule, schedule_of
from lungseg.diffusion.unet import UNet, UNetSpec
from lungseg.errors import InputError, LungsegError, MismatchError, StoreError
from lungseg.store.atomic import atomic_path, canonical_json, write_bytes

MODEL_FORMAT = 1
DECODER = ("unet.decoder.", "unet.norm_out.", "unet.conv_out.")
"""How the names of the tensors begin that features do not need."""
METADATA_KEY = "lungseg"
"""One key only: safetensors writes several keys in no fixed order, and the same run must give the same bytes."""


def unet_spec(config: TrainConfig) -> UNetSpec:
    """Network shape of a training configuration."""
    names = {field.name for field in dataclasses.fields(UNetSpec)} & set(vars(config))
    window = tuple(n // config.token_size for n in config.patch_size) if config.attention == "window" else None
    return UNetSpec(**{name: getattr(config, name) for name in names}, attention_window=window)


@dataclass(frozen=True)
class Student:
    """A trained model ready for use, in evaluation mode."""

    unet: UNet
    head: StudentHead
    window: HuWindow
    schedule: NoiseSchedule
    config: TrainConfig
    card: dict[str, Any]
    """Model card: images seen, number of cases, spacing_mm, fingerprints of the training volumes, standardisations."""

    @property
    def embedding(self) -> int:
        """Length of a token's descriptor at one noise level."""
        projected = _taught(self.config) and self.config.distill_weight > 0
        return self.config.embedding if projected else self.unet.spec.token_channels

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit vectors (M, embedding) of bottleneck tokens (M, C), by what was trained for it.

        The head's projection if the contrast trained it, the layer before it if only the regression did, and the
        tokens themselves if there was no distillation (METHOD 1.7, "diffusion only"): never untrained weights.
        """
        if not _taught(self.config):
            return torch.nn.functional.normalize(tokens.float(), dim=-1)
        if self.config.distill_weight == 0:
            return torch.nn.functional.normalize(self.head.hidden(tokens).float(), dim=-1)
        unit: torch.Tensor = self.head(tokens)[0].float()
        return unit

    def require_decoder(self, purpose: str) -> None:
        """Refuse to go on without a decoder.

        Raises
        ------
        MismatchError
            Saying for which ``purpose`` it is needed, and where it is.
        """
        if not self.unet.has_decoder:
            raise MismatchError(
                f"this model was exported for features and has no decoder, which {purpose} needs: give the "
                "model.safetensors of its training run (of the shipped starter model none is shipped: train your own "
                "with lungseg train-ddpm)"
            )

    def for_volume(self, image_hu: np.ndarray) -> Student:
        """The same model for tokens of one volume, int16 HU (Z, Y, X): 8-bit input depends on the volume's range."""
        return dataclasses.replace(self, window=self.window.of_volume(image_hu))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model's metadata and weights."""
        import hashlib

        digest = hashlib.sha256(canonical_json({"card": self.card, "config": to_dict(self.config)}).encode())
        for module in (self.unet, self.head):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _taught(config: TrainConfig) -> bool:
    """Whether any part of the head was trained."""
    return config.distill != "none" and max(config.distill_weight, config.regression_weight) > 0


def save_model(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    config: TrainConfig,
    card: Mapping[str, Any],
    extra_tensors: Mapping[str, torch.Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a self-describing safetensors file, atomically and with the same bytes for the same content.

    Parameters
    ----------
    weights
        Tensors named ``unet.*`` and ``head.*``; without those of ``DECODER`` the file says that it is for features.
    card
        JSON types; see :class:`Student`.
    extra_tensors, extra
        A fitted clustering (``fit.*``) and its description: what makes the file a bundle.
    """
    metadata = {
        "format": MODEL_FORMAT,
        "lungseg_version": __version__,
        "kind": "bundle" if extra else "model",
        "config": to_dict(config),
        "hu_window": HU_WINDOWS[config.hu_window].to_dict(),
        "card": dict(card),
        "extra": dict(extra or {}),
    }
    if not any(name.startswith(DECODER) for name in weights):
        metadata["decoder"] = False
    tensors = {name: t.detach().cpu().contiguous() for name, t in {**weights, **(extra_tensors or {})}.items()}
    write_bytes(path, save(tensors, metadata={METADATA_KEY: canonical_json(metadata)}))


def read_model_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file written by :func:`save_model`.

    Raises
    ------
    InputError
        If there is no such file.
    StoreError
        If it is truncated, or not safetensors.
    MismatchError
        If it is not a lungseg model, or of another format version.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such model file")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(METADATA_KEY)
            if header is None:
                raise MismatchError(f"{path} is a safetensors file but not a lungseg model")
            metadata: dict[str, Any] = json.loads(header)
            version = metadata.get("format") if isinstance(metadata, dict) else None
            if version != MODEL_FORMAT:
                raise MismatchError(f"{path} has model format {version}, this lungseg reads {MODEL_FORMAT}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged or not a model file: {error}") from error


def load_student(path: Path, *, device: str = "cpu") -> Student:
    """The model of a ``model.safetensors`` or bundle file, on ``device`` in float32.

    Raises
    ------
    InputError, StoreError, MismatchError
        As :func:`read_model_file`; MismatchError also if parts of the metadata are missing, or tensors are missing,
        unexpected or of another shape (the first ten are listed).
    """
    metadata, tensors = read_model_file(path)
    try:
        config = from_dict(TrainConfig, migrate(metadata["config"]))
        card, window = dict(metadata["card"]), HuWindow.from_dict(metadata["hu_window"])
        num_features = int(card["num_features"])
    except LungsegError as error:
        raise MismatchError(f"{path} was trained with settings this lungseg does not know: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{path} does not say all that is needed to use it: {error!r}") from error
    spec = unet_spec(config)
    unet = UNet(spec, decoder=bool(metadata.get("decoder", True)))
    head = StudentHead(spec.token_channels, config.embedding, num_features, config.head_norm)
    for prefix, module in (("unet.", unet), ("head.", head)):
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        _load_exactly(module, own, path)
        module.to(device).eval().requires_grad_(False)
    return Student(unet, head, window, schedule_of(config), config, card)


def _load_exactly(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    wanted = module.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, needs {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise MismatchError(f"{path} does not fit its own configuration: {'; '.join(problems[:10])}{more}")
    module.load_state_dict(dict(tensors))


def save_training_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state atomically."""
    with atomic_path(path) as partial, open(partial, "wb") as stream:
        torch.save(dict(state), stream)


def load_training_state(path: Path) -> dict[str, Any]:
    """Read a training state; tensors and plain values only.

    Raises
    ------
    StoreError
        If it is missing, truncated, damaged or no training state.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each kind of damage
        raise StoreError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise StoreError(f"{path} is damaged: it holds a {type(state).__name__}, not a training state")
    return state
