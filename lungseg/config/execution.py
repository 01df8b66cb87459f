"""Options of every command that change how it runs, never what it writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lungseg.config.fields import option
from lungseg.errors import UsageError

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Execution:
    """How a stage runs. No field of it reaches an artefact."""

    device: str = option("auto", "Where tensors live: auto, cpu, cuda or cuda:N.")
    jobs: int = option(1, "Cases worked on at the same time, one process each.", minimum=1)
    threads: int = option(1, "Threads of one process; results depend on their number, bit for bit.", minimum=1)
    gpus: int = option(0, "Training processes on this machine, one device each; 0: no launcher.", minimum=0)
    shard: str = option("", "Do only the i-th of n equal shares of the cases, written i/n from 1 (for job arrays).")
    overwrite: bool = option(False, "Replace existing results that were made with other settings or inputs.")
    dry_run: bool = option(False, "Print the settings and what would be done, then stop.")
    quiet: bool = option(False, "Print errors only.")
    verbose: bool = option(False, "Print more, with tracebacks of errors.")
    interface: str = "python"
    """`cli` or `python`: which progress bar is shown."""

    def check(self) -> list[str]:
        """Conflicts between fields, in words."""
        problems = []
        if self.quiet and self.verbose:
            problems.append("--quiet and --verbose exclude each other")
        try:
            _parse_shard(self.shard)
        except ValueError:
            problems.append(f"--shard: '{self.shard}' is not i/n with 1 <= i <= n")
        if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,4})?", self.device):
            problems.append(f"--device: '{self.device}' is not one of auto, cpu, cuda, cuda:N")
        return problems

    def take_shard(self, items: Sequence[ItemT]) -> list[ItemT]:
        """The items of this shard (every n-th), all of them without ``shard``."""
        index, count = _parse_shard(self.shard)
        return list(items[index - 1 :: count])


def _parse_shard(text: str) -> tuple[int, int]:
    if not text:
        return 1, 1
    index, count = (int(part) for part in text.split("/"))
    if not 1 <= index <= count:
        raise ValueError(text)
    return index, count


def resolve_device(name: str) -> str:
    """``auto`` becomes ``cuda`` where a CUDA device is available, else ``cpu``; other names are checked.

    Raises
    ------
    UsageError
        If a CUDA device is asked for and there is none of that number.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        number = int(name.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UsageError(f"--device {name}: this machine has {found} CUDA devices; use --device cpu or auto")
    return name
