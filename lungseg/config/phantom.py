"""Configuration of ``lungseg phantom``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option
from lungseg.config.preprocess import PreprocessConfig

SEVERITIES = ("healthy", "mild", "moderate", "severe")
MIXED = "mixed"
"""Severities in turn: the one of a phantom follows from its seed alone."""
DISEASES = ("emphysema", "ggo", "fibrosis", "consolidation")
"""Names a phantom's diseases may hold."""
VARIANTS = (
    "equal-hu", "large-consolidation", "cavity", "nodules", "arms-down", "no-table", "circle", "truncated",
)  # fmt: skip
"""Their meaning stands in ``lungseg/scan/phantom.py``."""


@dataclass(frozen=True)
class PhantomConfig:
    """Digital chest phantoms with known tissue: scans with their references, or a patch store."""

    num: int = option(1, "Phantoms to make.", minimum=1, maximum=10_000)
    seed: int = option(1000, "Seed of the first phantom; the next ones count up.", minimum=0, maximum=MAX_SEED)
    format: str = option(
        "dicom", "Series of DICOM files, image files, or a patch store at once.", choices=("dicom", "nifti", "store")
    )
    severity: str = option("moderate", "Share of diseased lung; mixed: each in turn.", choices=(*SEVERITIES, MIXED))
    diseases: tuple[str, ...] = option(DISEASES, "Diseases of phantoms that are not healthy.")
    kernel: str = option("standard", "Reconstruction kernel.", choices=("soft", "standard", "sharp"))
    dose: str = option(
        "standard", "Dose: a quarter, one, two and a half; noise goes with 1/sqrt.", choices=("low", "standard", "high")
    )
    extent_mm: tuple[float, float, float] = option(
        (300.0, 260.0, 340.0), "Field of view (z,y,x).", unit="mm", minimum=60, maximum=600
    )
    spacing_mm: tuple[float, float, float] = option(
        (1.25, 0.8, 0.8), "Voxel spacing of the scan (z,y,x).", unit="mm", minimum=0.4, maximum=10
    )
    slice_thickness_mm: float | None = option(
        None, "Thickness of a slice; none: the distance of slices.", unit="mm", minimum=0.3, maximum=15
    )
    noise_hu: float = option(
        22.0, "Noise of the standard kernel and dose in slices of 2 mm (SD).", unit="HU", minimum=0, maximum=300
    )
    variants: tuple[str, ...] = option((), f"Unusual: {', '.join(VARIANTS)}.")
    store_spacing_mm: float = option(
        PreprocessConfig.spacing_mm, "Isotropic spacing of a patch store.", unit="mm", minimum=0.3, maximum=10
    )
    patch_size: tuple[int, int, int] = option(
        PreprocessConfig.patch_size, "Training patch of a patch store (z,y,x).", unit="voxels", minimum=8, maximum=512
    )
    patch_stride: tuple[int, int, int] = option(
        PreprocessConfig.patch_stride,
        "Distance between listed patches of a store (z,y,x).",
        unit="voxels",
        minimum=1,
        maximum=512,
    )

    def check(self) -> list[str]:
        """Conflicts between fields, in words."""
        problems = []
        for name, given, known in (
            ("--diseases", self.diseases, DISEASES),
            ("--variants", self.variants, VARIANTS),
        ):
            problems += [f"{name}: '{word}' is not one of {', '.join(known)}" for word in given if word not in known]
            if len(set(given)) != len(given):
                problems.append(f"{name}: each name once, not {','.join(given)}")
        if not self.diseases and self.severity != SEVERITIES[0]:
            problems.append(f"--severity {self.severity} needs at least one of --diseases {','.join(DISEASES)}")
        needed = {"equal-hu": {"ggo", "fibrosis"}, "large-consolidation": {"consolidation"}}
        for variant, diseases in needed.items():
            if variant in self.variants and (
                not diseases <= set(self.diseases) or self.severity in (SEVERITIES[0], MIXED)
            ):
                problems.append(
                    f"--variants {variant} needs --diseases {','.join(sorted(diseases))} and one severity above healthy"
                )
        return problems

    def severity_of(self, seed: int) -> str:
        """Severity of the phantom of a seed."""
        return SEVERITIES[seed % len(SEVERITIES)] if self.severity == MIXED else self.severity

    def preprocessing(self, salt: str) -> PreprocessConfig:
        """What `lungseg preprocess` is asked for to make the same patch store."""
        return PreprocessConfig(
            spacing_mm=self.store_spacing_mm, patch_size=self.patch_size, patch_stride=self.patch_stride, salt=salt
        )
