# SPDX-License-Identifier: Apache-2.0
"""Machine code of a kernel, disassembled without a GPU, and what the shortest way through it costs."""
import heapq
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from torch_utils import custom_ops

LINE = re.compile(
    r'^(?P<label>\.\w+):|'
    r'/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)(?P<operands>.*?);', re.M)
EXIT = -1
WIDE_LOAD, WIDE_STORE = 'LDG.E.128', 'STG.E.128'


def find_nvdisasm():
    """Path of the disassembler: on the path or in a package of NVIDIA's; None without it."""
    spec = importlib.util.find_spec('nvidia')
    roots = [Path(p) for p in spec.submodule_search_locations or []] if spec else []
    found = [str(path) for root in roots for path in root.glob('*/bin/nvdisasm')]
    return shutil.which('nvdisasm') or next(iter(found), None)


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: str
    guard: str

    @property
    def ends_block(self):
        return self.op.partition('.')[0] in ('BRA', 'EXIT')

    @property
    def is_conditional(self):
        """A predicate stands before it or is its first operand; lanes that diverge decide BRA.DIV."""
        return bool(self.guard or self.op == 'BRA.DIV' or re.match(r'\s*!?U?P\d', self.operands))


class Code:
    """Instructions of one kernel in order, and where its labels are."""

    def __init__(self, kernel, arch, folder):
        path = folder / 'kernel.cubin'
        path.write_bytes(custom_ops.compile_cubin(kernel, arch))
        text = subprocess.run(
            [find_nvdisasm(), '-c', str(path)], capture_output=True, text=True, check=True).stdout
        body = re.split(r'^\.text\.', text, flags=re.M)
        body = next(part for part in body if part.startswith(f'{kernel.entry}:'))
        self.instructions, self.labels = [], {}
        for match in LINE.finditer(body):
            if match['label']:
                self.labels[match['label']] = len(self.instructions)
            elif match['op'] != 'NOP':
                self.instructions.append(Instruction(match['op'], match['operands'], match['guard'] or ''))

    def opcodes(self, *prefixes):
        """All that begin so."""
        return [i.op for i in self.instructions if i.op.startswith(prefixes)]

    def shortest(self, loads, stores):
        """Instructions on the shortest way to the exit that has so many 128-bit loads and stores."""
        blocks, queue, done = self._blocks(), [(0, 0, 0, 0)], set()  # cost, place, loads, stores
        while queue:
            cost, *state = heapq.heappop(queue)
            if state == [EXIT, loads, stores]:
                return cost
            if state[0] == EXIT or tuple(state) in done:
                continue
            done.add(tuple(state))
            start, *had = state
            length, *more, targets = blocks[start]
            had = [min(a + b, limit) for a, b, limit in zip(had, more, (loads, stores), strict=True)]
            for target in targets:
                heapq.heappush(queue, (cost + length, target, *had))
        raise AssertionError(f'no way through the code has {loads} loads and {stores} stores')

    def _blocks(self):
        """By first instruction: (instructions, wide loads, wide stores, where it goes on)."""
        ends = {i + 1 for i, each in enumerate(self.instructions) if each.ends_block}
        starts = sorted({0, *ends, *self.labels.values()} - {len(self.instructions)})
        blocks = {}
        for start, end in zip(starts, [*starts[1:], len(self.instructions)], strict=True):
            part = self.instructions[start:end]
            last, targets = part[-1], []
            if last.op.startswith('EXIT'):
                targets.append(EXIT)
            elif last.ends_block:
                targets.append(self.labels[re.search(r'`\((\.\w+)\)', last.operands)[1]])
            if (not last.ends_block or last.is_conditional) and end < len(self.instructions):
                targets.append(end)
            wide = [sum(i.op.startswith(op) for i in part) for op in (WIDE_LOAD, WIDE_STORE)]
            blocks[start] = (len(part), *wide, targets)
        return blocks
