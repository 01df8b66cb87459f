"""Configuration of ``lungseg benchmark``: which rows of the tables, on which phantoms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lungseg.config.ablations import ROWS
from lungseg.config.evaluate import MAX_BOOTSTRAP
from lungseg.config.fields import MAX_SEED, option
from lungseg.config.phantom import SEVERITIES
from lungseg.config.presets import PRESETS

SEGMENTATION = "segmentation"


@dataclass(frozen=True)
class BenchmarkConfig:
    """The tables of the paper on digital phantoms: every method, and the cumulative ablation. Source: METHOD 1.7."""

    preset: str = option("tiny", "Named settings of the stages, below the changes of each row.", choices=tuple(PRESETS))
    config: str = option("", "TOML file; its tables, named like the commands, set options of the stages.")
    rows: tuple[str, ...] = option((), "Rows to make; none: all of both tables.", choices=tuple(ROWS))
    train: int = option(6, "Phantoms to train and fit on; their labels are never read.", minimum=1, maximum=10_000)
    test: int = option(6, "Phantoms to score on.", minimum=1, maximum=10_000)
    healthy: int = option(1, "Healthy phantoms beside those, for false disease.", minimum=0, maximum=10_000)
    train_seed: int = option(62_000, "Seed of the first training phantom.", minimum=0, maximum=MAX_SEED)
    test_seed: int = option(
        8_000, "Seed of the first test phantom; the healthy ones follow.", minimum=0, maximum=MAX_SEED
    )
    severities: tuple[str, ...] = option(
        ("moderate", "mild", "moderate", "severe"), "Severities, dealt out in turn.", choices=SEVERITIES
    )
    extent_mm: tuple[float, float, float] | None = option(
        None, "Field of view of the phantoms (z,y,x); none: full size.", unit="mm", minimum=60, maximum=600
    )
    images: int | None = option(None, "Images each network is trained on; none: as the preset says.", minimum=1)
    oracle: bool = option(False, "Also score the best naming that the reference allows: a bound, not a result.")
    bootstrap: int = option(2000, "Resamples of patients for the 95 % interval.", minimum=100, maximum=MAX_BOOTSTRAP)

    def check(self) -> list[str]:
        """Conflicts between fields, in words."""
        problems = []
        if not self.severities:
            problems.append("--severities is empty")
        repeated = [name for name, count in Counter(self.rows).items() if count > 1]
        if repeated:
            problems.append(f"--rows: each row once, not {', '.join(repeated)} again")
        train = range(self.train_seed, self.train_seed + self.train)
        test = range(self.test_seed, self.test_seed + self.test + self.healthy)
        if max(train.start, test.start) < min(train.stop, test.stop):
            problems.append(
                f"training phantoms {train.start} to {train.stop - 1} and test phantoms {test.start} to "
                f"{test.stop - 1} overlap: move --train-seed or --test-seed"
            )
        for name, seeds in (("train-seed", train), ("test-seed", test)):
            if seeds.stop - 1 > MAX_SEED:
                problems.append(f"--{name}: the last seed would be above {MAX_SEED}")
        return problems

    def blocks(self, seed: int, num: int) -> list[tuple[str, int, int]]:
        """Severity, first seed and number of phantoms: ``num`` phantoms with the severities dealt out in turn."""
        dealt = Counter(self.severities[i % len(self.severities)] for i in range(num))
        found = []
        for severity, count in dealt.items():
            found.append((severity, seed, count))
            seed += count
        return found
