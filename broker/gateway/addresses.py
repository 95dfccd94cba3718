"""How many connections each address has (S37).

Owns one number per address that has any, so that a connection's column holds 4 bytes and not a text. Pure.
"""

from array import array


class Addresses:
    """Counts by address. The empty address is not counted; its number is 0."""

    __slots__ = ("_counts", "_free", "_names", "_numbers")

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._names = [""]
        self._counts = array("I", [0])
        self._free: list[int] = []

    def count(self, address: str) -> int:
        """Connections of this address; 0 for the empty one."""
        return self._counts[self._numbers.get(address, 0)]

    def enter(self, address: str) -> int:
        """One more; returns the address's number, for `leave`."""
        if not address:
            return 0
        number = self._numbers.get(address)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._names[number] = address
            else:
                number = len(self._names)
                self._names.append(address)
                self._counts.append(0)
            self._numbers[address] = number
        self._counts[number] += 1
        return number

    def leave(self, number: int) -> None:
        """One less. The last one frees the number."""
        if not number:
            return
        self._counts[number] -= 1
        if not self._counts[number]:
            del self._numbers[self._names[number]]
            self._names[number] = ""
            self._free.append(number)
