"""The files of a folder that a process owns: its own, and those of processes that have died."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from wsgi_bg._store.folder import Folder, file_of_order
from wsgi_bg._store.rows import Settings
from wsgi_bg._store.store import Parked, Store
from wsgi_bg.exceptions import StoreError

_PARK = 60.0  # a file of a dead process is closed if nothing is due for so many seconds


class OwnedFiles:
    """The file of this process in a folder, and files that it has taken over.

    A single thread calls :meth:`adopt`, :meth:`reopen` and :meth:`work_off`; other methods may
    be called from any thread.

    :param read: reads those rows of a file that are due; True if there may be more.
    :param attempt: calls a function, and logs its error.
    """

    def __init__(
        self,
        folder: Folder,
        settings: Settings,
        read: Callable[[Store], bool],
        attempt: Callable[[Callable[[], object]], None],
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._read = read
        self._attempt = attempt
        self._own: Store | None = None
        self._adopted: list[Store] = []
        self._behind: set[Store] = set()  # adopted files with further rows to be read
        self._parked: dict[int, Parked] = {}  # by the number of the file

    @property
    def own(self) -> Store:
        """The store of this process.

        :raises StoreError: if the file cannot be made.
        """
        if self._own is None:
            self._own = Store.own(self._folder, self._settings)
        return self._own

    @property
    def open(self) -> list[Store]:
        """The files that are open."""
        return [*filter(None, (self._own,)), *self._adopted]

    @property
    def numbers(self) -> list[int]:
        """The numbers of all files."""
        return [*self._parked.copy(), *(store.number for store in self.open)]

    @property
    def are_behind(self) -> bool:
        """True if files of dead processes have further rows to be read."""
        return bool(self._behind)

    def count_parked(self) -> int:
        """Return the number of rows in the files that are closed."""
        return sum(each.waiting for each in self._parked.copy().values())

    def count_waiting(self) -> int:
        """Return the number of rows that nobody holds and whose time has not come."""
        waiting = self.count_parked()
        for store in self.open:
            with suppress(StoreError):  # removed meanwhile, for example
                waiting += store.count_waiting(time.time())
        return waiting

    def adopt(self) -> None:
        """Take over the files of processes that have died, and begin to work them off."""
        while (adopted := Store.adopt(self._folder, self._settings)) is not None:
            self._begin_work(adopted)

    def reopen(self) -> None:
        """Open those closed files again that have a row due, or for which there is an order."""
        ordered = {file_of_order(path) for path in self._folder.orders()}
        for number, parked in self._parked.copy().items():
            if parked.due <= time.time() or number in ordered:
                del self._parked[number]
                self._begin_work(Store.reopen(self._folder, number, self._settings))

    def work_off(self, *, is_time: bool = True) -> None:
        """Read further rows of the files of dead processes; remove or close what is done.

        :param is_time: False to look only at the files that have work left: the process may own
            a hundred of them.
        """
        for store in list(self._adopted):
            if is_time or store in self._behind or store.needs_tidy:
                self._attempt(partial(self._work_off, store))

    def _begin_work(self, store: Store) -> None:
        self._adopted.append(store)
        store.tidy()  # obeys orders of the command line before a row is read
        self._attempt(partial(self._work_off, store))  # now: there may be hundreds to be closed

    def _work_off(self, store: Store) -> None:
        self._behind.discard(store)
        has_more = self._read(store)
        if has_more:
            self._behind.add(store)
        store.tidy()
        if store.is_empty:
            has_gone = store.remove(self.own)
        else:
            parked = None if has_more else store.park(time.time() + _PARK)
            has_gone = parked is not None
            if parked is not None:
                self._parked[store.number] = parked
        if has_gone:
            self._adopted.remove(store)
            self._behind.discard(store)
