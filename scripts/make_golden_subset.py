# SPDX-License-Identifier: Apache-2.0
"""Copy a few small cases of each golden group: python -m scripts.make_golden_subset SOURCE [tests/golden]

The result has the format of the source (index files, arrays, pickles, images), so the same tests read it.
"""
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NETWORK_FOLDER = 'official_pickle'
FOLDERS = ('.', NETWORK_FOLDER, 'legacy_tf', 'dataset_sources')
FILE_KEYS = ('npz', 'file', 'arrays', 'network', 'source')  # entries of a case that name files


@dataclass(frozen=True)
class Choice:
    """Which cases of a group to take: of each kind, the `number` cheapest in bytes.

    kind: key of a case whose values tell the kinds apart; '' for one kind.  names: exactly these cases
    instead.  lists: names of the lists of cases; other entries of the index are copied.  emptied: entries
    inside the cases that lose their contents, with the arrays that only they mention.
    """

    number: int = 2
    kind: str = ''
    names: tuple[str, ...] = ()
    lists: tuple[str, ...] = ('cases',)
    emptied: tuple[str, ...] = ()


# In this order: cases that need a network come after those that bring it.
GROUPS = {
    'ops_upfirdn2d': Choice(1, 'function'), 'ops_bias_act': Choice(6),
    'ops_conv2d_resample': Choice(3), 'ops_modulated_conv2d': Choice(3), 'ops_misc': Choice(1, 'function'),
    'layers': Choice(1, 'class'),
    # Of all gradients the norms remain, which are in the index.
    'nets': Choice(1, names=('G_orig16_gray',), emptied=('param_grad',)),
    'state_shapes': Choice(1, 'class'), 'init_rules': Choice(1, 'class'),
    'summary_tables': Choice(1, 'class'), 'augment': Choice(12), 'loss': Choice(1),
    'trajectory': Choice(0, lists=()), 'ema_ada': Choice(0, lists=()), 'loop_misc': Choice(0, lists=()),
    'train_configs': Choice(3, 'kind'), 'dataset_api': Choice(4),
    'official_pickle': Choice(1, names=('nv_cond_r16.pkl',)), 'evil': Choice(1),
    'legacy_tf': Choice(1, lists=('cases', 'errors')),
    'dataset_tool': Choice(2, 'exit_code'), 'cli_generate': Choice(2, 'tool'),
    'metrics': Choice(1, names=('slerp', 'ppl')),
    'projector': Choice(1, lists=('schedules', 'w_stats', 'noise_reg', 'trajectories', 'targets')),
}


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys of objects left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def without(value: Any, keys: tuple[str, ...]) -> Any:
    """A copy of a JSON value in which the entries `keys` of all objects are empty objects."""
    if isinstance(value, dict):
        return {key: {} if key in keys else without(item, keys) for key, item in value.items()}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


def name_of(case: dict[str, Any]) -> str:
    """What a case is called in its group; '' if it has no name."""
    return str(case.get('name') or case.get('id') or case.get('file') or '')


def needed_files(source: Path, case: dict[str, Any]) -> list[Path]:
    """The files and folders that belong to a case, relative to `source`."""
    named = [str(case[key]).rstrip('/') for key in FILE_KEYS if case.get(key)]
    candidates = [Path(folder, name) for name in named for folder in FOLDERS]
    return [path for path in candidates if (source / path).exists()]


def needed_arrays(keys: list[str], case: dict[str, Any]) -> set[str]:
    """Those array names of a group's file that a case mentions, in full or by their first parts."""
    mentioned = set(strings(case))
    prefixes = [text.rstrip('/') + '/' for text in mentioned if '/' in text] + [name_of(case) + '/']
    prefixes += [f'{case["nets"]}/{network}/' for network in 'GD' if isinstance(case.get('nets'), str)]
    return {key for key in keys if key in mentioned or key.startswith(tuple(prefixes))}


class Subset:
    """Copies chosen cases from one folder of golden data to another."""

    def __init__(self, source: Path, dest: Path):
        self.source, self.dest = source, dest

    def copy_group(self, group: str, choice: Choice) -> None:
        """Write the index of a group and all that its chosen cases need."""
        index = json.loads((self.source / f'{group}.json').read_text(encoding='utf-8'))
        files = [self.source / name for name in (f'{group}.npz', f'{group}_pixels.npz')]
        data = {path.name: dict(np.load(path)) for path in files if path.exists()}
        for key in choice.lists:
            index[key] = self.choose(index[key], choice, data)
            for case in index[key]:
                self.copy_files(case)
                self._drop_arrays(case, without(case, choice.emptied))
            index[key] = without(index[key], choice.emptied)
        cases = [case for key in choice.lists for case in index[key]]
        text = json.dumps(index, separators=(',', ':')) + '\n'
        (self.dest / f'{group}.json').write_text(text, encoding='utf-8')
        for name, arrays in data.items():
            chosen = set().union(*(needed_arrays(list(arrays), case) for case in [index, *cases]))
            self._save(name, {key: arrays[key] for key in arrays if key in chosen or not choice.lists})

    def choose(self, cases: list[Any], choice: Choice, data: dict[str, dict[str, np.ndarray]]) -> list[Any]:
        """The chosen ones of `cases`, in their order."""
        if choice.names:
            return [case for case in cases if name_of(case) in choice.names]
        kinds: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, case in enumerate(cases):
            if self._has_network(case):
                kinds[str(_find(case, choice.kind))].append((self._bytes(case, data), i))
        rows = [i for costs in kinds.values() for _, i in sorted(costs)[:choice.number]]
        return [cases[i] for i in sorted(rows)]

    def copy_files(self, case: dict[str, Any]) -> None:
        """Copy what belongs to a case, unless it is there."""
        for path in needed_files(self.source, case):
            origin, target = self.source / path, self.dest / path
            for file in [f for f in [origin, *origin.rglob('*')] if f.is_file()]:
                copy = target / file.relative_to(origin)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)

    def _has_network(self, case: dict[str, Any]) -> bool:
        network = case.get('network')
        return network is None or (self.dest / NETWORK_FOLDER / network).exists()

    def _bytes(self, case: dict[str, Any], data: dict[str, dict[str, np.ndarray]]) -> int:
        arrays = sum(a[key].nbytes for a in data.values() for key in needed_arrays(list(a), case))
        roots = [self.source / path for path in needed_files(self.source, case)]
        files = sum(f.stat().st_size for root in roots for f in [root, *root.rglob('*')] if f.is_file())
        return len(json.dumps(case)) + arrays + files

    def _drop_arrays(self, case: dict[str, Any], reduced: dict[str, Any]) -> None:
        """Remove from a case's own file what the reduced case no longer mentions."""
        dropped = set(strings(case)) - set(strings(reduced))
        if dropped:
            arrays = dict(np.load(self.dest / case['npz']))
            self._save(case['npz'], {key: value for key, value in arrays.items() if key not in dropped})

    def _save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        np.savez_compressed(self.dest / name, **arrays)


def _find(case: dict[str, Any], key: str) -> Any:
    """The entry of a case, or of its expectation."""
    expected = case.get('expected')
    return case.get(key, expected.get(key) if isinstance(expected, dict) else None)


def make_subset(source: Path, dest: Path) -> int:
    """Replace the folder `dest` by a small copy of `source`; returns its size in bytes.

    Groups that `source` does not have are skipped. Nothing changes if reading fails.
    """
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix='.golden-') as temporary:
        subset = Subset(source, Path(temporary, 'new'))
        subset.dest.mkdir()
        for group, choice in GROUPS.items():
            if (source / f'{group}.json').exists():
                subset.copy_group(group, choice)
        if dest.exists():
            dest.rename(Path(temporary, 'old'))
        subset.dest.rename(dest)
    return sum(file.stat().st_size for file in dest.rglob('*') if file.is_file())


def main(args: list[str]) -> int:
    """Command line; returns the exit status."""
    if not 1 <= len(args) <= 2 or not Path(args[0]).is_dir():
        print('Give a folder of golden data, and optionally where the small copy goes.', file=sys.stderr)
        return 2
    dest = Path(args[1]) if len(args) == 2 else ROOT / 'tests' / 'golden'
    print(f'{dest}: {make_subset(Path(args[0]), dest):,} bytes')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
