"""Compares the journal of :mod:`benchmarks.soak` with the logs, to find lost tasks."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path

GROWTH = 0.05
"""How much memory may grow, as a fraction, from the second third of a server's life to the
last."""
_NOT_RUN = re.compile(
    r"^\w+ background task \S*?(\w+) was not (?:run|finished)\b", re.MULTILINE
)
_RAISED = re.compile(r"^ERROR background task \S+ raised RuntimeError$", re.MULTILINE)


class Account:
    """Reads the journal and the logs in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.added: dict[str, str] = {}
        self.begun: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.failed = 0
        self.in_hand: list[int] = []
        self._read(folder / "journal")
        logs = "".join(log.read_text() for log in folder.glob("*.log"))
        self.raised = len(_RAISED.findall(logs))
        self.named = Counter(_NOT_RUN.findall(logs))

    def _read(self, journal: Path) -> None:
        with journal.open() as lines:
            for line in lines:
                event, *words, number = line.split()
                if event == "added":
                    self.added[number] = words[0]
                elif event == "begun":
                    self.begun[number] += 1
                elif event == "ended":
                    self.ended[number] += 1
                elif event == "failed":
                    self.failed += 1
                else:  # SIGTERM
                    self.in_hand.append(len(self.added) - len(self.ended))

    def report(self) -> list[str]:
        """Print the figures; return the failed checks."""
        unfinished = Counter(
            name for number, name in self.added.items() if number not in self.ended
        )
        twice = [number for number, times in self.begun.items() if times > 1]
        unknown = self.begun.keys() - self.added.keys()
        lost = (unfinished - self.named).total()
        print(
            f"tasks: {len(self.added)} added, {len(self.ended)} ran to their end "
            f"({self.failed} of them raised), {self.named.total()} named in the log, "
            f"{lost} lost, {len(twice)} run twice\n"
            f"    in hand at each SIGTERM: {self.in_hand}"
        )
        wrong = []
        if unfinished != self.named:
            wrong.append(f"unfinished: {dict(unfinished)}, named: {dict(self.named)}")
        stuck = sum(times for name, times in self.named.items() if name.startswith("stuck"))
        if self.named.total() != 2 * stuck:  # a further task waits behind each stuck task
            wrong.append(f"more is named than what is stuck: {dict(self.named)}")
        if twice:
            wrong.append(f"run twice: {len(twice)} tasks")
        if unknown:
            wrong.append(f"run and not added: {len(unknown)} tasks")
        if self.failed != self.raised:
            wrong.append(f"{self.failed} tasks raised, the log names {self.raised}")
        return wrong


def memory_line(readings: list[float], *, judge: bool) -> list[str]:
    """Print a server's memory in MB; return the failed checks."""
    print("    MB:", *(f"{reading:.1f}" for reading in readings))
    third = len(readings) // 3
    if not third:
        return []
    second, last = map(statistics.median, (readings[third:-third], readings[-third:]))
    print(f"    MB, median of the second and of the last third: {second:.1f}, {last:.1f}")
    return ["memory grows"] if judge and last > second * (1 + GROWTH) else []
