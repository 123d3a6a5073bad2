# SPDX-License-Identifier: Apache-2.0
"""What reading one file may cost in bytes, operations and seconds, so that no small file costs much."""
import time
from typing import Any

BASE_BYTES = 256 << 20
BYTES_PER_BYTE = 6  # of the file: literals, arguments, tensors, and some to spare
ELEMENT_BYTES = 100  # an entry of a dict or set
OPERATION_BYTES = 64  # the object that an opcode may create
MAX_OPERATIONS = 500_000  # a file with three networks takes some 100,000
BASE_SECONDS, BYTES_PER_SECOND = 8.0, 20e6  # of processor time; honest files are read ten times as fast
OPERATIONS_PER_LOOK = 1024  # at the clock


class Refused(Exception):
    """The pickle refers to a global that is not in the table; the message is its dotted name."""


class Damaged(Exception):
    """The file is truncated, malformed, costs too much, or uses a feature that no network file needs."""


class Budget:
    """Limits for all that reads one file of `size` bytes; whoever copies or computes something charges it.

    Nothing is ever given back. Every method raises Damaged once a limit is exceeded.
    """

    def __init__(self, size: int):
        self.size = size
        limit = BASE_BYTES + BYTES_PER_BYTE * size
        self.bytes_left = min(limit, max(_free_bytes(), BASE_BYTES))
        self.operations_left = MAX_OPERATIONS
        self._deadline_sec = time.thread_time() + BASE_SECONDS + size / BYTES_PER_SECOND

    def charge(self, num_bytes: int) -> None:
        """Bytes that are copied, or held for longer than a moment."""
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise Damaged(f'reading it would take far more memory than its {self.size} bytes justify, or '
                          'than is free')

    def charge_values(self, values: tuple) -> None:
        """Arguments of a function that may copy them and their items: a small file can pass one list again
        and again.
        """
        for value in values:
            self.charge(_weight(value))
            if type(value) in (list, tuple):
                self.charge(sum(len(item) for item in value if type(item) in (str, bytes)))

    def operate(self, argument: Any = None) -> None:
        """One opcode with its argument from the file."""
        self.operations_left -= 1
        if self.operations_left < 0:
            raise Damaged(f'more than {MAX_OPERATIONS} operations')
        if self.operations_left % OPERATIONS_PER_LOOK == 0 and time.thread_time() > self._deadline_sec:
            raise Damaged('it takes too long to read')
        self.charge(OPERATION_BYTES + (len(argument) if type(argument) in (str, bytes) else 0))


def _weight(value: Any) -> int:
    if type(value) in (str, bytes):
        return len(value)
    return ELEMENT_BYTES * len(value) if type(value) in (list, tuple, dict, set) else 0


def _free_bytes() -> int:
    """Memory that can be had without swapping; without limit where the system does not tell."""
    try:
        with open('/proc/meminfo', encoding='ascii') as file:
            found = {line.split(':')[0]: line.split()[1] for line in file}
        return int(found['MemAvailable']) * 1024
    except (OSError, LookupError, ValueError):
        return 1 << 62
