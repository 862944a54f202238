"""Which low-rank adapter lies in which of the executor's slots."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True, slots=True)
class Adapter:
    """``slot`` counts from 1. ``identity`` tells its weights from all others: what it computed is found by that."""

    name: str
    slot: int
    identity: str


class Adapters:
    """The adapters that requests may name."""

    def __init__(self, max_loras: int) -> None:
        self._max_loras = max_loras
        self._by_name: dict[str, Adapter] = {}

    def names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._by_name)

    def get(self, name: str | None) -> Adapter | None:
        """The adapter of a name; None for None. May be called from any thread.

        Raises:
            RequestError: there is none of this name.
        """
        if name is None:
            return None
        adapter = self._by_name.get(name)
        if adapter is None:
            known = ", ".join(list(self._by_name)) or "none"
            raise RequestError(f"there is no adapter {name!r}", f"add it with add_lora; there is: {known}")
        return adapter

    def place(self, name: str, identity: str) -> Adapter:
        """An adapter with a free slot, to be kept with ``add`` when its weights are there.

        Raises:
            RequestError: the name is in use, or all slots are.
        """
        if not isinstance(name, str) or not name:
            raise RequestError(f"the name of an adapter is {name!r}", "give a text")
        if name in self._by_name:
            raise RequestError(f"there is an adapter {name!r} already", "remove it first, or choose another name")
        taken = {adapter.slot for adapter in self._by_name.values()}
        free = next((slot for slot in range(1, self._max_loras + 1) if slot not in taken), None)
        if free is None:
            raise RequestError(f"there are {len(taken)} adapters already", "remove one, or raise max_loras")
        return Adapter(name, free, identity)

    def add(self, adapter: Adapter) -> None:
        self._by_name[adapter.name] = adapter

    def remove(self, adapter: Adapter) -> None:
        del self._by_name[adapter.name]
