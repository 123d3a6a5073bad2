# SPDX-License-Identifier: Apache-2.0
"""LSUN databases as a source of dataset_tool, read by a process of their own."""
import importlib.util
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

from dnnlib.util import UserError, open_regular
from training.datasets.images import ImageError, read_header
from training.datasets.source_image import Header, SourceImage

BATCH_BYTES = 4 << 20  # sent at once
MAX_VALUE_BYTES = 256 << 20
MIN_ENTRY_BYTES = 10  # a node of the tree with an empty key: LMDB counts no more entries than fit in the file
ANSWER_SEC = 300
Entry = tuple[bytes, bytes]


class LmdbSource:
    """An LSUN database: values in key order, each an encoded image, read as RGB; without labels."""

    on_error = 'skip'  # as published: LSUN contains damaged entries
    class_names = None

    def __init__(self, path: str) -> None:
        if importlib.util.find_spec('lmdb') is None:
            raise UserError(f'--source={path}: LSUN needs one more package: pip install lmdb')
        self.notes: list[str] = []
        self._path = path
        try:
            with open_regular(Path(path, 'data.mdb')) as file:
                num_bytes = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise self._refused(error) from error
        with closing(self._messages()) as messages:
            self._length = next(messages)
        if self._length * MIN_ENTRY_BYTES > num_bytes:
            raise self._refused(f'it counts {self._length} images in {num_bytes} bytes')

    def _refused(self, reason: object) -> UserError:
        return UserError(f'--source={self._path}: not an LMDB database, or damaged ({reason})')

    def _messages(self) -> Iterator[int | list[Entry]]:
        """The number of entries, then lists of them.

        A damaged database can crash the process that reads it, since LMDB maps the file into memory.
        """
        context = multiprocessing.get_context('spawn')
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(self._path, sender), daemon=True)
        process.start()
        sender.close()  # so that the end of the process ends the pipe
        try:
            while True:
                if not receiver.poll(ANSWER_SEC):
                    raise self._refused(f'no answer for {ANSWER_SEC} s')
                message = receiver.recv()
                if message is None:
                    return
                if isinstance(message, str):
                    raise self._refused(message)
                yield message
        except EOFError:
            process.join()
            raise self._refused(_end_of(process.exitcode)) from None
        finally:
            receiver.close()
            process.kill()
            process.join()

    def _entries(self) -> Iterator[Entry]:
        count = 0
        with closing(self._messages()) as messages:
            next(messages)
            for batch in messages:
                yield from batch
                count += len(batch)
                # A tree that contains itself would never end.
                if count > self._length:
                    raise self._refused(f'more than its {self._length} entries')

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SourceImage]:
        for key, value in self._entries():
            yield SourceImage(_key_text(key), None, value, is_rgb=True)

    def headers(self) -> Iterator[Header]:
        """Only of the first readable image: reading all headers would read the whole database."""
        for key, value in self._entries():
            try:
                shape = read_header(value).shape
            except ImageError:
                continue
            yield _key_text(key), (*shape[:2], 3)
            return


def _send(path: str, sender: Connection) -> None:
    """Send the number of entries, lists of (key, value), and None; or a reason in one line."""
    import lmdb
    try:
        # No lock file: the database may be on a read-only disk.
        with lmdb.open(path, readonly=True, lock=False, max_readers=1) as database:
            sender.send(database.stat()['entries'])
            with database.begin(write=False, buffers=True) as transaction:
                _send_entries(transaction.cursor(), sender)
        sender.send(None)
    except (lmdb.Error, MemoryError) as error:
        sender.send(' '.join(str(error).split()) or type(error).__name__)
    except BrokenPipeError:  # the reader has enough
        return


def _send_entries(cursor: Iterator[tuple[memoryview, memoryview]], sender: Connection) -> None:
    batch: list[Entry] = []
    num_bytes = 0
    for key, value in cursor:
        # Larger ones would be refused as images, too.
        batch.append((bytes(key), bytes(value[:MAX_VALUE_BYTES])))
        num_bytes += len(batch[-1][1])
        if num_bytes >= BATCH_BYTES:
            sender.send(batch)
            batch, num_bytes = [], 0
    sender.send(batch)


def _end_of(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f'reading it ends with {signal.Signals(-exit_code).name}'
    return f'reading it ends with status {exit_code}'


def _key_text(key: bytes) -> str:
    return f'key {key.decode("ascii", "backslashreplace")}'
