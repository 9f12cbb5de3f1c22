"""What autograd keeps for a backward pass, counted while it does."""

from __future__ import annotations


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps at a time, weights left out; their peak."""

    def __init__(self, module) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._holders: dict[int, list[int]] = {}  # address -> [how many, bytes]
        self.now = self.peak = 0

    def pack(self, tensor):
        return _Saved(self, tensor)

    def hold(self, storage) -> None:
        at = storage.data_ptr()
        if at in self._weights:
            return
        if at not in self._holders:
            self._holders[at] = [0, storage.nbytes()]
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._holders[at][0] += 1

    def drop(self, storage) -> None:
        at = storage.data_ptr()
        if at in self._weights:
            return
        self._holders[at][0] -= 1
        if not self._holders[at][0]:
            self.now -= self._holders.pop(at)[1]


class _Saved:
    """A tensor as autograd keeps it, counted for as long."""

    def __init__(self, counter: SavedBytes, tensor) -> None:
        self.counter, self.tensor = counter, tensor
        counter.hold(tensor.untyped_storage())

    def __del__(self) -> None:
        self.counter.drop(self.tensor.untyped_storage())
