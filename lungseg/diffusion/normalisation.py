"""How Hounsfield units become network input and back: a piecewise linear window saved with every model."""

from __future__ import annotations

import itertools
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
        result = torch.empty_like(x)
        for low, high, y_low, y_high in zip(source, source[1:], target, target[1:], strict=False):
            inside = (x >= low) & (x <= high)
            result = torch.where(inside, y_low + (x - low) * ((y_high - y_low) / (high - low)), result)
        return result

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"name": self.name, "knots_hu": list(self.knots_hu), "knots_norm": list(self.knots_norm)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HuWindow:
        """Window saved by ``to_dict``.

        Raises
        ------
        MismatchError
            If the knots do not rise.
        """
        window = cls(str(data["name"]), tuple(map(float, data["knots_hu"])), tuple(map(float, data["knots_norm"])))
        for knots in (window.knots_hu, window.knots_norm):
            if len(knots) < 2 or any(a >= b for a, b in itertools.pairwise(knots)):
                raise MismatchError(f"the model's HU window '{window.name}' is not rising: {data}")
        return window


HU_WINDOWS = {
    "companded": HuWindow("companded", (-1024.0, -700.0, 400.0), (-1.0, 0.1, 1.0)),
    "linear": HuWindow("linear", (-1024.0, 400.0), (-1.0, 1.0)),
    # DiffSegLung README and `denorm_hu`: x = (HU + 1000) / 700 - 1
    "paper": HuWindow("paper", (-1000.0, 400.0), (-1.0, 1.0)),
}
