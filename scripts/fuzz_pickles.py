# SPDX-License-Identifier: Apache-2.0
"""Damages network files in thousands of ways, and shows that opening them runs nothing and never crashes.

Hostile files made by scripts.hostile_files are opened, too. Run as
`python -m scripts.fuzz_pickles --count=10000 --made=2000 [FILES]`; without files, small ones are damaged.
"""
import argparse
import codecs
import collections
import contextlib
import io
import os
import pickle
import random
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import legacy
from dnnlib.progress import progress
from dnnlib.util import UserError
from scripts import hostile_files
from torch_utils import persistence
from training import networks
from training.formats import rebuild, rosinality, safetensors_file

MAX_SECONDS = 10.0  # for one file; a good one takes milliseconds
MAX_GROWTH_BYTES = 1 << 30  # of the process, over all files
OPCODES = (b'().012FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}'
           b'\x81\x82\x84\x85\x86\x87\x88\x8b\x8c\x8e\x8f\x90\x93\x94\x97')
HUGE = [b'\xff\xff\xff\x7f', b'\xff\xff\xff\xff', struct.pack('<Q', 1 << 60), b'\x00\x00\x00\x80']
CALLS = [b'cposix\nsystem\nX\x04\x00\x00\x00true\x85R', b'cbuiltins\neval\nX\x011\x85R', b'cos\nsystem\n',
         b'ctorch.storage\n_load_from_bytes\nC\x02N.\x85R', b'cbuiltins\nset\n(lK\x01a\x85R',
         b'ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R',
         b'cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R']
# What Python reports of itself (sys.addaudithook) when code runs or the world changes.
FORBIDDEN = ('exec', 'compile', 'open', 'import', 'os.', 'subprocess.', 'socket.', 'shutil.', 'ctypes.',
             'tempfile.', 'pickle.find_class', 'marshal.', 'code.', 'mmap.')


class _Watch:
    """Collects forbidden events while active. There is one, because hooks cannot be taken off again."""

    def __init__(self) -> None:
        self.is_active, self.events, self.is_installed = False, [], False

    def hook(self, event: str, args: tuple) -> None:
        # The interpreter asks how much memory is free.
        if self.is_active and event.startswith(FORBIDDEN) and args[:1] != ('/proc/meminfo',):
            self.events.append(f'{event} {str(args)[:100]}')

    @contextlib.contextmanager
    def active(self) -> Iterator[list[str]]:
        """Collect, into the list that is given, until the block ends."""
        if not self.is_installed:
            sys.addaudithook(self.hook)
            self.is_installed = True
        self.events = []
        self.is_active = True
        try:
            yield self.events
        finally:
            self.is_active = False


_watch = _Watch()


class BarePickler(pickle.Pickler):
    """Pickles networks as training does, but without their source texts, which are most of a small file."""

    def reducer_override(self, obj: Any) -> Any:
        """How to pickle an object; NotImplemented: as usual."""
        if isinstance(obj, type) or not persistence.is_persistent(obj):
            return NotImplemented
        function, (meta,), _ = obj.__reduce_ex__(4)
        bare = {**meta, 'module_src': 'raise RuntimeError("it ran")'}
        bare.pop('companions', None)
        return function, (bare,), None


def small_files() -> list[bytes]:
    """One small network as a pickle, as safetensors, and as a rosinality checkpoint of both formats."""
    G = networks.Generator(
        z_dim=2, c_dim=0, w_dim=2, img_resolution=8, img_channels=3, mapping_kwargs={'num_layers': 1},
        synthesis_kwargs={'channel_base': 16, 'channel_max': 2}).eval()
    contents, stream = {'G_ema': G, 'training_set_kwargs': {'path': 'x'}}, io.BytesIO()
    BarePickler(stream, protocol=4).dump(contents)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ('net.safetensors', 'net.pt')]
        safetensors_file.write(paths[0], contents)
        rosinality.write(paths[1], contents)
        held, old = torch.load(paths[1], weights_only=True), io.BytesIO()
        torch.save(held, old, _use_new_zipfile_serialization=False)
        return [stream.getvalue(), *(path.read_bytes() for path in paths), old.getvalue()]


def mutated(data: bytes, generator: random.Random) -> bytes:
    """The file with some changes of the kinds in MUTATIONS."""
    changed = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4, 8])):
        if changed:
            generator.choice(MUTATIONS)(changed, generator)
    return bytes(changed)


def _flip_bit(data: bytearray, generator: random.Random) -> None:
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def _change_opcode(data: bytearray, generator: random.Random) -> None:
    data[generator.randrange(len(data))] = generator.choice(OPCODES)


def _truncate(data: bytearray, generator: random.Random) -> None:
    del data[generator.randrange(len(data)):]


def _delete(data: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(data))
    del data[at:at + generator.randrange(1, 9)]


def _repeat(data: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(data))
    data[at:at] = data[at:at + generator.randrange(1, 99)] * generator.choice([1, 1, 50])


def _declare_huge(data: bytearray, generator: random.Random) -> None:
    at, size = generator.randrange(len(data)), generator.choice(HUGE)
    data[at:at + len(size)] = size


def _insert_calls(data: bytearray, generator: random.Random) -> None:
    """Calls, of the allowed and of others, as arguments of each other."""
    at = generator.randrange(len(data))
    data[at:at] = b''.join(generator.choices(CALLS, k=generator.randrange(1, 5)))


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    _flip_bit, _flip_bit, _change_opcode, _change_opcode, _truncate, _delete, _repeat, _declare_huge,
    _insert_calls]


def outcome(data: bytes) -> str:
    """'loaded' or 'refused'. Raises AssertionError if a file does anything else; see FORBIDDEN."""
    start = time.process_time()
    with _watch.active() as events:
        try:
            legacy.load_network_pkl(io.BytesIO(data))
            result = 'loaded'
        except UserError as error:
            assert str(error).isprintable() and str(error).isascii(), f'a message of several lines: {error!r}'
            result = 'refused'
    assert not events, f'something ran: {events[:3]}'
    assert time.process_time() - start < MAX_SECONDS, f'it took {time.process_time() - start:.1f} s'
    return result


@dataclass(frozen=True)
class Report:
    """Numbers of files that loaded and were refused, most processor time of one, growth of peak memory."""

    outcomes: collections.Counter
    longest_sec: float
    growth_bytes: int

    def __str__(self) -> str:
        return (f'{self.outcomes["refused"]:,} refused, {self.outcomes["loaded"]:,} loaded, 0 executed; '
                f'longest {self.longest_sec:.2f} s, peak memory +{self.growth_bytes >> 20} MiB')


def fuzz(files: Sequence[bytes], count: int, seed: int) -> Report:
    """What became of `count` damaged versions of the files. Raises Failure for any unclean behaviour."""
    generator = random.Random(seed)
    damaged = (mutated(files[number % len(files)], generator) for number in range(count))
    return _try_all(damaged, count, files)


def attack(files: Sequence[bytes], count: int, seed: int) -> Report:
    """As fuzz(), of `count` files of scripts.hostile_files; `files` are opened before, untouched."""
    generator = random.Random(seed)
    return _try_all((hostile_files.hostile_file(generator) for _ in range(count)), count, files)


def _try_all(hostile: Iterable[bytes], count: int, good: Sequence[bytes]) -> Report:
    """Open all hostile files, after the good ones.  count: of the hostile files."""
    # What is imported on first use is imported now, before it counts: our classes, codecs of pickle and zip.
    for name in rebuild.CLASSES:
        rebuild.class_of('', name)
    for name in ('raw_unicode_escape', 'unicode_escape', 'latin1', 'ascii', 'cp437'):
        codecs.lookup(name)
    for data in good:
        with contextlib.suppress(UserError):
            legacy.load_network_pkl(io.BytesIO(data))
    outcomes, longest_sec, before = collections.Counter(), 0.0, _memory_bytes()
    with warnings.catch_warnings(), progress(total=count, desc='Opening', unit='files') as bar:
        warnings.simplefilter('ignore')
        for number, data in enumerate(hostile):
            start_sec = time.process_time()
            try:
                outcomes[outcome(data)] += 1
            except (AssertionError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError,
                    MemoryError, OSError, RuntimeError, TypeError, ValueError, pickle.PickleError) as error:
                raise Failure(data, f'file {number}: {type(error).__name__}: {error}') from error
            longest_sec = max(longest_sec, time.process_time() - start_sec)
            bar.update(1)
    growth_bytes = _memory_bytes() - before
    if growth_bytes > MAX_GROWTH_BYTES:
        raise Failure(b'', f'the process grew by {growth_bytes:,} bytes')
    return Report(outcomes, longest_sec, growth_bytes)


class Failure(Exception):
    """A damaged file was not refused as it should be. data: the file."""

    def __init__(self, data: bytes, text: str):
        super().__init__(text)
        self.data = data


def _memory_bytes() -> int:
    """The most memory that the process ever had; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=10_000, help='damaged files to open')
    parser.add_argument('--made', type=int, default=2_000, help='hostile files to make and open')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('files', nargs='*', metavar='FILE', help='network files to damage')
    chosen = parser.parse_args(args)
    files = [Path(path).read_bytes() for path in chosen.files] or small_files()
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    try:
        damaged = fuzz(files, chosen.count, chosen.seed)
        made = attack(files, chosen.made, chosen.seed)
    except Failure as failure:
        Path(folder, 'failure.bin').write_bytes(failure.data)
        sys.exit(f'{failure}\nThe file is kept as {folder}/failure.bin')
    left = os.listdir(folder)
    if left:
        sys.exit(f'Something was created: {", ".join(left)}')
    os.rmdir(folder)
    print(f'{chosen.count:,} damaged files: {damaged}\n{chosen.made:,} hostile files: {made}')


if __name__ == '__main__':
    main()
