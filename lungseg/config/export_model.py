"""Configuration of ``lungseg export-model``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import option


@dataclass(frozen=True)
class ExportModelConfig:
    """What of a trained model goes into the file that is shared. Source: METHOD 0.5."""

    decoder: bool = option(False, "Keep the decoder: synthesize needs it, maps of scans do not.")
    precision: str = option(
        "fp16", "Numbers of the weights; tokens of fp16 differ in the third digit or later.", choices=("fp16", "fp32")
    )
