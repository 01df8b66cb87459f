"""How Hounsfield units become network input and back: a piecewise linear window saved with every model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lungseg.errors import MismatchError
from lungseg.store.patches import volume_limits


@dataclass(frozen=True)
class HuWindow:
    """Strictly rising piecewise linear map from HU to [-1, 1]; values outside the knots are clipped.

    Source: METHOD 0.2. `companded` spends 55 % of the range below -700 HU, where emphysema and healthy lung differ.
    """

    name: str
    knots_hu: tuple[float, ...]
    knots_norm: tuple[float, ...]
    levels: int = 0
    """Steps the range is rounded to; 0: none."""
    per_volume: bool = False
    """The first and last knot stand for the least and largest HU of each volume: see ``of_volume``."""

    def normalise(self, volume_hu: torch.Tensor, limits_hu: torch.Tensor | None = None) -> torch.Tensor:
        """HU (any real dtype) to float32 in [-1, 1].

        Parameters
        ----------
        volume_hu : tensor (N, ...) or any shape
            HU.
        limits_hu : tensor (N, 2), optional
            Least and largest HU of the volume each row comes from; for windows that are ``per_volume``.

        Raises
        ------
        MismatchError
            If the window is ``per_volume`` and there are no limits.
        """
        hu = volume_hu.float()
        if self.per_volume:
            if limits_hu is None:
                raise MismatchError(f"HU window '{self.name}' depends on the volume: use window.of_volume first")
            low, high = (x.float().view(-1, *[1] * (hu.ndim - 1)) for x in limits_hu.unbind(1))
            return self._rounded((hu - low) / (high - low).clamp(min=1) * 2 - 1).clamp(-1, 1)
        return self._rounded(self._map(hu, self.knots_hu, self.knots_norm))

    def _rounded(self, x_norm: torch.Tensor) -> torch.Tensor:
        if not self.levels:
            return x_norm
        steps = self.levels - 1
        return ((x_norm + 1) / 2 * steps).round() / steps * 2 - 1

    def of_volume(self, image_hu: np.ndarray) -> HuWindow:
        """The window to use with one volume: itself, unless it is ``per_volume``.

        Parameters
        ----------
        image_hu : int16 array, shape (Z, Y, X)
            The whole volume.
        """
        if not self.per_volume:
            return self
        low, high = volume_limits(image_hu)
        return HuWindow(self.name, (low, high), (-1.0, 1.0), levels=self.levels)

    def denormalise(self, x_norm: torch.Tensor) -> torch.Tensor:
        """[-1, 1] back to HU, float32: the exact inverse inside the window.

        Raises
        ------
        MismatchError
            If the window is ``per_volume``: its input was no longer in HU.
        """
        if self.per_volume:
            raise MismatchError(
                f"a model trained with --hu-window {self.name} has forgotten HU: it cannot draw patches in HU"
            )
        return self._map(x_norm.float(), self.knots_norm, self.knots_hu)

    @staticmethod
    def _map(x: torch.Tensor, source: tuple[float, ...], target: tuple[float, ...]) -> torch.Tensor:
        x = x.clamp(source[0], source[-1])
        result = x  # NaN lies in no piece: it stays NaN
        for low, high, y_low, y_high in zip(source, source[1:], target, target[1:], strict=False):
            result = torch.where(x >= low, y_low + (x - low) * ((y_high - y_low) / (high - low)), result)
        return torch.where(x >= source[-1], target[-1], result)  # the last knot too without rounding

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        plain: dict[str, Any] = {
            "name": self.name,
            "knots_hu": list(self.knots_hu),
            "knots_norm": list(self.knots_norm),
        }
        return plain | ({"levels": self.levels, "per_volume": self.per_volume} if self.levels else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HuWindow:
        """Window saved by ``to_dict``.

        Raises
        ------
        MismatchError
            If knots are missing, do not pair up, or do not rise.
        """
        try:
            knots_hu, knots_norm = (tuple(map(float, data[key])) for key in ("knots_hu", "knots_norm"))
            levels, per_volume = int(data.get("levels", 0)), bool(data.get("per_volume", False))
            window = cls(str(data["name"]), knots_hu, knots_norm, levels, per_volume)
        except (KeyError, TypeError, ValueError) as error:
            raise MismatchError(f"the model's HU window is incomplete or damaged: {error!r}") from error
        rising = all(a < b for knots in (knots_hu, knots_norm) for a, b in itertools.pairwise(knots))
        finite = all(map(math.isfinite, (*knots_hu, *knots_norm)))
        if len(knots_hu) < 2 or len(knots_hu) != len(knots_norm) or not rising or not finite:
            raise MismatchError(f"the model's HU window '{window.name}' is not rising: {dict(data)}")
        return window


HU_WINDOWS = {
    "companded": HuWindow("companded", (-1024.0, -700.0, 400.0), (-1.0, 0.1, 1.0)),
    "linear": HuWindow("linear", (-1024.0, 400.0), (-1.0, 1.0)),
    # DiffSegLung README and `denorm_hu`: x = (HU + 1000) / 700 - 1
    "paper": HuWindow("paper", (-1000.0, 400.0), (-1.0, 1.0)),
    # the baseline that loses HU (METHOD 1.7): minimum to maximum of each volume in 256 steps
    "8-bit": HuWindow("8-bit", (0.0, 255.0), (-1.0, 1.0), levels=256, per_volume=True),
}
