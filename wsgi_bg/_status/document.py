"""The documents that a process writes into a folder, and their form as JSON.

The terminal may read documents as another user than the one who has written them: a value of a
wrong type raises ``ValueError``, and the reader ignores the document.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple, TypeVar

from wsgi_bg._status.model import (
    OTHER_NAMES,
    Failure,
    LostTask,
    ProcessStatus,
    RunningTask,
    State,
)
from wsgi_bg._status.numbers import LOST, Tally

T = TypeVar("T")

VERSION = 1
"""The version of the documents; a reader ignores documents of another version."""

MAX_NAMES = 1_000
"""How many names are counted; the tasks of further names are counted together."""

MAX_FAILURES = 100
MAX_LOST = 100
MAX_KILLED = 20

MINUTES = 60

_TEXT = (str,)
_MAYBE_TEXT = (str, type(None))
_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_WHOLE = (int,)

_KINDS: dict[type, tuple[tuple[type, ...], ...]] = {
    RunningTask: (
        _TEXT,
        _MAYBE_TEXT,
        _MAYBE_TEXT,
        _MAYBE_NUMBER,
        _WHOLE,
        _WHOLE,
        _MAYBE_TEXT,
    ),
    Failure: (_TEXT, _MAYBE_TEXT, _MAYBE_TEXT, _NUMBER, _WHOLE, _WHOLE, _TEXT, _TEXT, _TEXT),
    LostTask: (_TEXT, _MAYBE_TEXT, _MAYBE_TEXT, _MAYBE_NUMBER, _WHOLE),
    ProcessStatus: (
        _WHOLE,
        _NUMBER,
        _NUMBER,
        (bool,),
        _TEXT,
        *(_WHOLE,) * 4,
        (int, type(None)),
        _WHOLE,
        _MAYBE_NUMBER,
        _WHOLE,
    ),
}


class KeepDone(NamedTuple):
    """How many ended tasks are kept by id, and for how many seconds."""

    number: int
    age: float


KEEP_DONE = KeepDone(10_000, 3600.0)
"""Of a process without a durable runner."""


@dataclass
class Numbers:
    """Numbers of ended tasks, and the last failures."""

    names: dict[str, Tally] = field(default_factory=dict)
    minutes: dict[int, Tally] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def tally_of(self, name: str) -> Tally:
        """Return the tally of ``name``, or of the other names if there are too many."""
        return self.names[self.place_of(name)]

    def place_of(self, name: str) -> str:
        """Return the name under which the tasks of ``name`` are counted."""
        if name not in self.names:
            if len(self.names) >= MAX_NAMES:
                name = OTHER_NAMES
            self.names.setdefault(name, Tally())
        return name

    def add(self, other: Numbers) -> None:
        """Add the numbers of another process."""
        for name, tally in other.names.items():
            self.tally_of(name).merge(tally)
        for minute, tally in other.minutes.items():
            self.minutes.setdefault(minute, Tally()).merge(tally)
        self.failures += other.failures

    def dump(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "version": VERSION,
            "names": {name: tally.dump() for name, tally in self.names.items()},
            "minutes": {str(minute): tally.dump() for minute, tally in self.minutes.items()},
            "failures": [astuple(failure) for failure in self.failures],
        }

    def read(self, dumped: dict[str, Any]) -> None:
        """Set the numbers to those that were dumped."""
        self.names = {name: Tally.load(each) for name, each in dumped["names"].items()}
        self.minutes = {int(key): Tally.load(each) for key, each in dumped["minutes"].items()}
        self.failures = [_load(Failure, each) for each in dumped["failures"]]


@dataclass
class Document(Numbers):
    """The status of a process.

    :ivar running: each with True if a file keeps the task.
    :ivar running_by_name: also of tasks for which :attr:`running` has no room.
    :ivar unlisted: the same of these tasks alone, without tasks that a file keeps.
    :ivar waiting: numbers by name, without tasks that a file keeps.
    :ivar ids: the states of tasks that wait or run, by id.
    :ivar durable: the folders of durable runners, and the numbers of the process's files.
    :ivar outboxes: the folders of messages.
    :ivar has_ended: True if the process has ended by itself, and has lost nothing.
    """

    process: ProcessStatus | None = None
    running: list[tuple[RunningTask, bool]] = field(default_factory=list)
    running_by_name: dict[str, int] = field(default_factory=dict)
    unlisted: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    ids: dict[str, State] = field(default_factory=dict)
    durable: dict[str, list[int]] = field(default_factory=dict)
    outboxes: list[str] = field(default_factory=list)
    keep_done: KeepDone = KEEP_DONE
    has_ended: bool = False

    def dump(self) -> dict[str, Any]:
        """Return the document for JSON; see :meth:`load`."""
        assert self.process is not None
        return {
            **super().dump(),
            "process": astuple(self.process),
            "running": [(astuple(task), is_stored) for task, is_stored in self.running],
            "running_by_name": self.running_by_name,
            "unlisted": self.unlisted,
            "waiting": self.waiting,
            "ids": self.ids,
            "durable": self.durable,
            "outboxes": self.outboxes,
            "keep_done": self.keep_done,
            "has_ended": self.has_ended,
        }

    @classmethod
    def load(cls, dumped: dict[str, Any], *, is_brief: bool = False) -> Document:
        """Return the document of which ``dumped`` is the :meth:`dump`.

        :param is_brief: leave out the numbers, which take the longest.
        """
        document = cls()
        if not is_brief:
            document.read(dumped)
        document.process = _load(ProcessStatus, dumped["process"])
        document.running = [
            (_load(RunningTask, task), bool(is_stored)) for task, is_stored in dumped["running"]
        ]
        document.running_by_name = _counts(dumped["running_by_name"])
        document.unlisted = _counts(dumped["unlisted"])
        document.waiting = _counts(dumped["waiting"])
        document.ids = {id: _check(_TEXT, state) for id, state in dumped["ids"].items()}  # noqa: A001
        document.durable = {
            path: [int(number) for number in numbers]
            for path, numbers in dumped["durable"].items()
        }
        document.outboxes = [_check(_TEXT, path) for path in dumped["outboxes"]]
        document.keep_done = _keep_done(dumped["keep_done"])
        document.has_ended = bool(dumped["has_ended"])
        return document

    @property
    def was_killed(self) -> bool:
        """True if tasks were lost with the process, which has ended."""
        lost = self._counted or any(not is_stored for _, is_stored in self.running)
        return bool(lost) and not self.has_ended

    @property
    def _counted(self) -> Counter[str]:
        """The tasks of which the document knows no more than the name and the number."""
        return Counter(self.waiting) + Counter(self.unlisted)

    def lost(self) -> list[LostTask]:
        """Return the tasks that were lost with the process, which was killed.

        Those in :attr:`running` are the last: of them the request and the begin are known, and
        the last tasks are kept. Counts the tasks by name, too.
        """
        assert self.process is not None
        pid = self.process.pid
        ran: list[LostTask] = []
        for task, is_stored in self.running:
            if not is_stored:
                self.tally_of(task.name).counts[LOST] += 1
                ran.append(LostTask(task.name, task.id, task.request, task.since, pid))
        counted: list[LostTask] = []
        for name, count in self._counted.items():
            self.tally_of(name).counts[LOST] += count
            room = MAX_LOST - len(counted)
            counted += [LostTask(name, None, None, None, pid)] * min(count, room)
        return [*counted, *ran][-MAX_LOST:]


@dataclass
class Past(Numbers):
    """The status of all processes that have ended.

    :ivar lost: the oldest first.
    :ivar killed: processes that were killed, the oldest first.
    :ivar added: numbers of processes whose documents were added and may still be there.
    """

    lost: list[LostTask] = field(default_factory=list)
    killed: list[ProcessStatus] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    keep_done: KeepDone = KEEP_DONE

    def dump(self) -> dict[str, Any]:
        """Return the document for JSON; see :meth:`load`."""
        return {
            **super().dump(),
            "lost": [astuple(task) for task in self.lost],
            "killed": [astuple(process) for process in self.killed],
            "added": self.added,
            "keep_done": self.keep_done,
        }

    @classmethod
    def load(cls, dumped: dict[str, Any]) -> Past:
        """Return the document of which ``dumped`` is the :meth:`dump`."""
        past = cls()
        past.read(dumped)
        past.lost = [_load(LostTask, each) for each in dumped["lost"]]
        past.killed = [_load(ProcessStatus, each) for each in dumped["killed"]]
        past.added = [int(number) for number in dumped["added"]]
        past.keep_done = _keep_done(dumped["keep_done"])
        return past

    def forget_old(self, now: float) -> None:
        """Forget what is too old or too much to be shown."""
        oldest = now // 60 - MINUTES
        self.minutes = {key: tally for key, tally in self.minutes.items() if key > oldest}
        self.failures = sorted(self.failures, key=lambda each: each.ended)[-MAX_FAILURES:]
        self.lost = self.lost[-MAX_LOST:]
        hour_ago = now - 3600.0
        self.killed = [each for each in self.killed if each.updated > hour_ago][-MAX_KILLED:]


def _load(kind: type[T], values: Any) -> T:
    checked = map(_check, _KINDS[kind], values)
    if len(values) != len(_KINDS[kind]):
        raise ValueError
    return kind(*checked)


def _check(kinds: tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kinds):
        raise ValueError  # as for any other wrong content
    return value


def _counts(dumped: dict[str, Any]) -> dict[str, int]:
    return {name: int(count) for name, count in dumped.items()}


def _keep_done(dumped: Any) -> KeepDone:
    number, age = dumped
    return KeepDone(int(number), float(age))
