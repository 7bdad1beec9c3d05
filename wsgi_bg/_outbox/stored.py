"""``StoredMessages``: messages in a file until the broker has confirmed them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wsgi_bg._process import log
from wsgi_bg._process.greenlets import event, start_daemon
from wsgi_bg._process.repeated import RepeatedError
from wsgi_bg._store.folder import Folder
from wsgi_bg._store.owned_files import OwnedFiles
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg._tasks.checks import WhenUnsent
from wsgi_bg._tasks.task_log import fields_of
from wsgi_bg.exceptions import MessageError, StoreError

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask, Queue

_LOOK = 1.0  # seconds between two looks at the folder
_READ = 500  # rows read from a file at a time
_BURST, _REST = 10, 0.001  # messages read from a file, and the seconds between two bursts


class Message(NamedTuple):
    """The call of a task, as an engine's workers get it."""

    name: str
    """The name of the task at the engine."""
    data: Any
    """What :meth:`Connection.send` sends."""
    due: float = 0.0
    """The time from which the task may run (:func:`time.time`); 0.0 for at once."""
    can_run_here: bool = True
    """False if only a worker can make the call."""
    when_unsent: WhenUnsent = "hold"
    """Set by the runner."""
    expires: float = inf
    """The time after which the task does not run in this process either."""
    call_here: Callable[[], Any] | None = None
    """Makes the call in this process, in place of a function that would send the task."""
    runs_here: bool = False
    """True if the call is made in this process, and nothing is sent."""


class _Outbox(Protocol):
    """See :class:`wsgi_bg._outbox.outbox.Outbox`."""

    @property
    def room(self) -> int: ...

    def put(self, task: BackgroundTask, stored: Stored) -> Queue: ...

    def count_aside(self) -> None: ...


class Stored:
    """A message, and the row that holds it once :meth:`claim` and the store have succeeded."""

    __slots__ = ("__weakref__", "_right", "has_begun", "message", "row", "runs_here", "store")

    def __init__(self, message: Message, row: Row, store: Store | None = None) -> None:
        self.message: Message = message
        self.row: Row = row
        self.store: Store | None = store
        self.has_begun: bool = False
        self.runs_here: bool = message.runs_here
        self._right = {"to store": store is None}

    @property
    def call_here(self) -> Callable[[], Any] | None:
        """See :class:`Message`."""
        return self.message.call_here

    def claim(self) -> bool:
        """Claim the right to store the row; True for a single caller only."""
        return self._right.pop("to store", False)  # one atomic step

    def unclaim(self) -> None:
        """Give the claim back: the row was not stored."""
        self._right["to store"] = True

    def begin(self) -> bool:
        """Note that the message is about to be sent; False if it was discarded by hand."""
        if self.has_begun or self.store is None:
            return True
        self.has_begun = True
        try:
            return self.store.begin(self.row)
        except StoreError:  # no room for a note, which only shows that the message is sent
            return True

    def end(self, state: str, error: str = "") -> None:
        """Note that the message was sent, was put aside or is taken back. Does not block."""
        store, self.store = self.store, None
        if store is not None:
            store.end(Outcome(self.row, state, ended=time.time(), error=error))

    def leave(self) -> None:
        """Leave the row to the thread that reads the file, or to the next process."""
        store, self.store = self.store, None
        assert store is not None
        store.leave([self.row])


Read = Callable[[Row], "tuple[BackgroundTask, Message]"]


class StoredMessages:
    """The file of this process in a folder, and the files of processes that have died.

    :param outbox: sends the messages.
    :param find: returns the function of a task by its name; None if it is not known (yet).
    :param read: returns the task and the message of a row, which may be forged. Raises
        ``MessageError`` if the row cannot be read.
    """

    def __init__(
        self,
        folder: Folder,
        settings: Settings,
        outbox: _Outbox,
        find: Callable[[str], object],
        read: Read,
    ) -> None:
        self._folder = folder
        self._files = OwnedFiles(folder, settings, self._read, self._try)
        self._outbox = outbox
        self._find = find
        self._read_row = read
        self._has_left_some = False
        self._has_more = False  # True if a look has not read all that is due
        # Keys of rows, by the name of a task that is not known yet, or no more.
        self._unknown: dict[str, dict[Store, list[int]]] = {}
        self._right = {"to start": True}
        self._wake = event()
        self._error = RepeatedError("%s could not be looked at")
        self._is_stopping = False

    @property
    def store(self) -> Store:
        """The store of this process.

        :raises StoreError: if the file cannot be made.
        """
        return self._files.own

    def start(self) -> None:
        """Send the messages that earlier processes have left; starts a thread once.

        :raises StoreError: if this process cannot make its file.
        """
        if not self._right.pop("to start", False):  # one atomic step
            return
        try:
            _ = self.store
            start_daemon(self._work, "wsgi_bg-outbox-files")
        except BaseException:
            self._right["to start"] = True
            raise

    def start_if_any(self) -> None:
        """Do what :meth:`start` does, but only if the folder has a file.

        :raises StoreError: as :meth:`start` does.
        :raises OSError: if the folder cannot be read.
        """
        if self._right and self._folder.numbers():
            self.start()

    def keep(self, messages: Sequence[Stored]) -> None:
        """Store messages in one transaction; blocks.

        :raises StoreError: if they are not stored.
        """
        store = self.store
        claimed = [each for each in messages if each.claim()]
        if not claimed:
            return
        rows: list[Row] = []
        try:
            store.add([each.row for each in claimed], rows)
            for each, row in zip(claimed, rows, strict=True):
                each.row = row
                each.store = store
        except BaseException:
            store.take_back(rows)
            for each in claimed:
                each.store = None
                each.unclaim()
            raise

    def count_waiting(self) -> int:
        """Return the number of messages in the files whose time has not come."""
        return self._files.count_waiting()

    def leave(self, stored: Stored) -> None:
        """Let the row of a message be read again as room comes, or when it is due."""
        stored.leave()
        self._has_left_some = True

    def stop(self, leave: Callable[[], int]) -> None:
        """Read no more rows, and log once how many messages ``leave()`` has left."""
        self._is_stopping = True
        self._wake.set()
        left = leave()
        if left:
            log.info("%d messages stay in %s for the next process", left, self._folder.path)

    def _work(self) -> None:
        while not self._is_stopping:
            self._has_more = False
            self._try(self._look)
            if not self._has_more:
                self._wake.wait(_LOOK)
                self._wake.clear()
        self._try(self.store.tidy)

    def _try(self, func: Callable[[], object]) -> None:
        """Call ``func()``, and log its error, the same error at most once a minute."""
        try:
            func()
        except Exception as exc:
            self._error.log(exc, self._folder.path)

    def _look(self) -> None:
        self._try(self._look_at_unknown)
        self._try(self._read_own)
        self._try(self.store.tidy)
        self._try(self._files.adopt)
        self._try(self._files.reopen)
        self._files.work_off()

    def _look_at_unknown(self) -> None:
        for name in [name for name in self._unknown if self._find(name) is not None]:
            for store, keys in self._unknown.pop(name).items():
                store.leave_keys(keys)
            self._has_left_some = True

    def _read_own(self) -> None:
        due = self.store.next_due()
        if self._has_left_some or (due is not None and due <= time.time()):
            has_more = True  # also if the file cannot be read
            self._has_left_some = False  # first: a request may set it meanwhile
            try:
                has_more = self._read(self.store)
            finally:
                if has_more:
                    self._has_left_some = True

    def _read(self, store: Store) -> bool:
        """Send messages of ``store`` that no memory holds; True if there may be more."""
        room = max(0, min(_READ, self._outbox.room))
        rows = store.read(time.time(), room)
        for index, row in enumerate(rows):
            if self._is_stopping:
                store.leave(rows[index:])
                return True
            if index % _BURST == 0:
                # Or the threads that send would compete with the requests for the GIL.
                time.sleep(_REST)
            self._send(store, row)
        has_more = len(rows) == room
        self._has_more |= has_more and room > 0
        return has_more

    def _send(self, store: Store, row: Row) -> None:
        if self._find(row.name) is None:
            if row.name not in self._unknown:
                log.error(
                    "messages for %s wait in %s: no task has that name", row.name, store.path
                )
            self._unknown.setdefault(row.name, {}).setdefault(store, []).append(row.key)
            return
        try:
            task, message = self._read_row(row)
        except MessageError as exc:  # a forged row
            self._outbox.count_aside()
            extra = fields_of(row.name, row.id, "aside", str(exc))
            log.error("a message for %s was put aside: %s", row.name, exc, extra=extra)
            store.end(Outcome(row, "aside", ended=time.time(), error=type(exc).__name__))
            return
        self._outbox.put(task, Stored(message, row, store))()
