"""Something that must exist once in each process: neither a fork nor a pickle may carry it over."""

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class PerProcess(Generic[T]):
    """Makes a value when it is first asked for in a process; threads and locks do not survive a fork.

    Args:
        make: builds the value, without arguments; picklable if this object is to be pickled.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._slots: dict[int, _Slot[T]] = {}

    def get(self) -> T:
        """The value of this process."""
        # setdefault is atomic, and a lock that lost the race is dropped unused; the parent's lock may be held for ever
        slot = self._slots.setdefault(os.getpid(), _Slot())
        with slot.lock:
            if not slot.values:
                slot.values.append(self._make())
            return slot.values[0]

    def forget(self) -> T | None:
        """What this process has, which is this object's no more; the next `get` makes another."""
        slot = self._slots.pop(os.getpid(), None)
        return slot.values[0] if slot and slot.values else None

    def __reduce__(self) -> tuple[type, tuple[Callable[[], T]]]:
        return PerProcess, (self._make,)


class _Slot(Generic[T]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: list[T] = []
