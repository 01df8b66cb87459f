"""A process that reads mutants is started, asked, timed and replaced when it dies; the answers become a table."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuzz_child import make_mutant

HERE = Path(__file__).resolve().parent
SECONDS = 30.0
"""A reader that takes longer for a scan of some kilobytes hangs."""
GROWTH_MIB = 512.0
"""A reader that needs more for such a scan believed a header."""
FAIR = ("refused", "right", "shorter", "unnoticeable", "said so")

Answer = dict[str, Any]


class Child:
    """One reading process; a new one takes over when it dies."""

    def __init__(self, seed: int) -> None:
        command = [sys.executable, str(HERE / "fuzz_child.py"), str(seed)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, number: int, *, seconds: float) -> Answer | str:
        """The answer for one mutant, or how the process ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return f"hang: no answer in {seconds:g} s"
        except BrokenPipeError:
            line = ""
        if line:
            answer: Answer = json.loads(line)
            return answer
        code = self.process.wait()
        return f"crash: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def fuzz(numbers: Sequence[int], seed: int) -> Iterator[Answer]:
    """The answers for mutants, in order; a mutant that kills or hangs its process is told as such."""
    child: Child | None = None
    try:
        for number in numbers:
            first = child is None
            child = child or Child(seed)
            begin = time.monotonic()
            answer = child.ask(number, seconds=SECONDS * (2 if first else 1))  # the first one waits for imports
            if isinstance(answer, str):
                mutant = make_mutant(number, seed)
                told = {"number": number, "kind": mutant.kind, "base": mutant.base, "detail": mutant.detail}
                answer = {**told, "verdict": answer.split(":")[0], "reason": answer, "grown_mib": 0.0}
                answer["seconds"] = time.monotonic() - begin
                child = None
            elif answer["grown_mib"] > GROWTH_MIB:
                answer |= {"verdict": "memory", "reason": f"{answer['grown_mib']:.0f} MiB; {answer['reason']}"}
            yield answer
    finally:
        if child is not None:
            child.close()


def table(answers: Sequence[Answer]) -> str:
    """Markdown: kind of mutation against verdict."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        verdict = answer["verdict"] if answer["verdict"] in FAIR else "defect"
        counts[answer["kind"]][verdict] += 1
        counts["all"][verdict] += 1
    columns = (*FAIR, "defect")
    lines = ["| kind of mutation | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for kind in [*sorted(k for k in counts if k != "all"), "all"]:
        row = counts[kind]
        lines.append(f"| {kind} | {sum(row.values())} | " + " | ".join(str(row[c]) for c in columns) + " |")
    return "\n".join(lines)


def keep(folder: Path, answer: Answer, seed: int) -> None:
    """The files of one mutant and what was wrong with them."""
    target = folder / f"{answer['verdict']}-seed{seed}-{answer['number']}"
    target.mkdir(parents=True, exist_ok=True)
    for name, data in make_mutant(answer["number"], seed).files.items():
        (target / name).write_bytes(data)
    (target / "ANSWER.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
