"""A model for features alone: without the decoder and in half precision, a sixth of the size of what was trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lungseg.diffusion.checkpoint import DECODER
from lungseg.errors import MismatchError


def without_decoder(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model that its tokens depend on: encoder, middle and heads."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(DECODER)}


def half_precision(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Floating tensors as float16, rounded to the nearest; counts stay as they are.

    Raises
    ------
    MismatchError
        If a value does not fit: beyond 65504, infinite or not a number.
    """
    result = {name: t.to(torch.float16) if t.is_floating_point() else t for name, t in weights.items()}
    outside = [name for name, tensor in result.items() if not bool(tensor.isfinite().all())]
    if outside:
        raise MismatchError(
            f"the weights {', '.join(outside[:5])} hold values that half precision cannot: use --precision fp32, "
            "and look at the training, which such weights seldom come from"
        )
    return result
