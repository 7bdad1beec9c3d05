"""``Notes``: which tasks have begun and ended, where neither SIGKILL nor a full disk matters.

The file has eight bytes for each task under way, and is mapped into memory: the kernel has
whatever was written there when the process dies. Its blocks are allocated before, because
writing to a mapped hole of a full disk is a SIGBUS.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import count

BEGUN, DONE, FAILED, ASIDE, GONE = range(5)

END_OF_KEYS = 1 << 61
"""Keys are smaller: a note has a key and three bits for the state."""

SLOTS = 65_536
"""The number of tasks that run, or have ended and could not be deleted yet."""


def states(slots: Iterable[int]) -> dict[int, int]:
    """Return the states of the slots that are in use, by key."""
    return {slot >> 3: slot & 7 for slot in slots if slot}


class Notes:
    """The notes of a file of tasks. Methods may be called from any thread.

    :ivar epoch: grows each time another process has taken over the file.
    """

    def __init__(self, path: str) -> None:
        """Map the file ``path``; make it first if necessary.

        :raises OSError: if there is no room for the file.
        """
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, SLOTS * 8)
            self._map = mmap.mmap(file, SLOTS * 8)
        finally:
            os.close(file)
        # Native 64-bit items: a store of eight bytes is never half done.
        self._slots = memoryview(self._map).cast("Q")
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []
        self._unused = count(1)

    @property
    def epoch(self) -> int:
        return self._slots[0]

    def read(self) -> dict[int, int]:
        """Return the states by key, as a process has left them."""
        return states(self._slots[1:])

    def reset(self, epoch: int) -> None:
        """Forget all notes, and then set the epoch."""
        self._slots[1:] = memoryview(bytes((SLOTS - 1) * 8)).cast("Q")
        self._slots[0] = epoch

    def set(self, key: int, state: int) -> bool:
        """Note a state; False if there is no room."""
        slot = self._slot_of.get(key)
        if slot is None:
            slot = self._take()
            if slot >= SLOTS:
                return False
            self._slot_of[key] = slot
        self._slots[slot] = key << 3 | state
        return True

    def _take(self) -> int:
        if self._free:
            with suppress(IndexError):
                return self._free.pop()
        return next(self._unused)

    def clear(self, keys: Iterable[int]) -> None:
        """Forget tasks: their rows are gone, or have not begun."""
        for key in keys:
            slot = self._slot_of.pop(key, 0)
            if slot:
                self._slots[slot] = 0
                self._free.append(slot)

    def __contains__(self, key: int) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def close(self) -> None:
        """Unmap the file; any later call raises ``ValueError``."""
        self._slots.release()
        self._map.close()
