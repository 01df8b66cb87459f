"""How Hounsfield units become network input and back: a piecewise linear window saved with every model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lungseg.errors import MismatchError


@dataclass(frozen=True)
class HuWindow:
    """Strictly rising piecewise linear map from HU to [-1, 1]; values outside the knots are clipped.

    Source: METHOD 0.2. `companded` spends 55 % of the range below -700 HU, where emphysema and healthy lung differ.
    """

    name: str
    knots_hu: tuple[float, ...]
    knots_norm: tuple[float, ...]

    def normalise(self, volume_hu: torch.Tensor) -> torch.Tensor:
        """HU (any real dtype) to float32 in [-1, 1]."""
        return self._map(volume_hu.float(), self.knots_hu, self.knots_norm)

    def denormalise(self, x_norm: torch.Tensor) -> torch.Tensor:
        """[-1, 1] back to HU, float32: the exact inverse inside the window."""
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
        return {"name": self.name, "knots_hu": list(self.knots_hu), "knots_norm": list(self.knots_norm)}

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
            window = cls(str(data["name"]), knots_hu, knots_norm)
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
}
