# SPDX-License-Identifier: Apache-2.0
"""Extracts the kernels of an iteration from a profile, each with the layer that it belongs to.

Forward operations are inside the label of their layer. A backward operation belongs to the autograd node
that is evaluated, and so to the operation that created the node: both have the same thread and sequence
number. Nodes created during a backward pass, for gradients of gradients, lead back through one more node.
"""
import bisect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from training.profiling import labels as labels
from training.profiling.ops import (
    Convolution,
    describe_shapes,
    dtype_of,
    is_convolution,
    is_operation,
    kernels_of,
)

NODE = 'autograd::engine::evaluate_function: '
OPTIMIZER = 'Optimizer.step#'
BACKWARD_SCOPE = 1  # scope of a RecordFunction
FPROP, BPROP, OPTIMISER, INPUT = 'fprop', 'bprop', 'optimiser', 'input'  # directions
LOSS, GRADIENTS, LATENTS, UPDATE, UNKNOWN = 'loss', 'gradients', 'latents', 'update', '?'


@dataclass(frozen=True)
class Place:
    """The place of an operation in the program.

    network: 'G', 'D', ...; '' outside of networks.  path: dotted name of the layer; outside of networks,
    the kind of work.  after: path of the last layer before the operation, if a module that has layers itself
    calls it.  op: name of the forward operation.
    """

    network: str
    path: str
    after: str = ''
    op: str = ''


@dataclass(frozen=True)
class ProfiledKernel:
    """A GPU kernel or CPU operation, with its time.

    phase, pass_index: of the iteration; '' and -1 outside of phases.  op: the called operation, such as
    aten::convolution.  own_op: operator of torch_utils.ops around it, or ''.  parameters: shapes as text.
    convolution: None for other operations.  dtype: of its input, as named by the profiler.
    kernel: name of the kernel.  start_us: since the step began.
    """

    direction: str
    phase: str
    pass_index: int
    place: Place
    op: str
    own_op: str
    parameters: str
    convolution: Convolution | None
    dtype: str
    kernel: str
    start_us: float
    microseconds: float


@dataclass(frozen=True)
class _Span:
    """A label of the main thread, from start to end in microseconds."""

    start: float
    end: float
    names: list[str]


class Trace:
    """The events of one labelled iteration. kernels(): in launch order.

    step_us: duration of the iteration.  on_gpu: whether kernels are GPU kernels.
    """

    def __init__(self, events: Sequence[FunctionEvent]):
        on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
        step = next(e for e in on_cpu if labels.read_label(e.name) == [labels.STEP])
        self.start_us, self.step_us = step.time_range.start, step.time_range.elapsed_us()
        on_cpu = [e for e in on_cpu if step.time_range.start <= e.time_range.start <= step.time_range.end]
        # Of events with the same start, the longer contains the shorter.
        self.events = sorted(on_cpu, key=lambda e: (e.time_range.start, -e.time_range.end))
        self._on_device = [e for e in events if e.device_type == DeviceType.CUDA and _is_work(e.name)]
        self.on_gpu = bool(self._on_device)
        self._phases, self._passes = self._spans(labels.PHASE), self._spans(labels.PASS)
        self._creators = self._find_creators()
        self._before: dict[int, FunctionEvent] = self._nodes_before()
        self._places: dict[int, Place | None] = {}

    def kernels(self) -> list[ProfiledKernel]:
        """All kernels of the iteration."""
        found = self._gpu_kernels() if self.on_gpu else self._cpu_kernels()
        kernels = [self._kernel(*item) for item in found]
        running_us = sum(e.time_range.elapsed_us() for e in self._on_device)
        missing_us = running_us - sum(kernel.microseconds for kernel in kernels)
        if self.on_gpu and missing_us > 1:
            kernels.append(_unknown_kernel(missing_us))
        return kernels

    def _gpu_kernels(self) -> Iterator[tuple[FunctionEvent, str, float, bool]]:
        """(CPU event that launched it, name, microseconds, whether it is the longest of the event)."""
        for event in self.events:
            kernels = [kernel for kernel in event.kernels if _is_work(kernel.name)]
            longest = max(kernels, key=lambda kernel: kernel.duration, default=None)
            for kernel in kernels:
                yield event, kernel.name, kernel.duration, kernel is longest

    def _cpu_kernels(self) -> Iterator[tuple[FunctionEvent, str, float, bool]]:
        for event in self.events:
            parent = event.cpu_parent
            if is_operation(event.name) and (parent is None or not is_operation(parent.name)):
                for kernel, microseconds in kernels_of(event):
                    yield kernel, kernel.name, microseconds, True

    def _kernel(self, event: FunctionEvent, name: str, microseconds: float, is_main: bool) -> ProfiledKernel:
        """is_main: whether it does the arithmetic of the event, not a layout conversion for it."""
        phase, pass_span = self._within(self._phases, event), self._within(self._passes, event)
        place = self._place(event) or self._place_outside(event, phase, pass_span)
        # Among the operations around a kernel, only the convolution has the usual arguments.
        main = next((e for e in _ancestors(event) if is_convolution(e)), event)
        convolution = Convolution.of_event(main) if is_convolution(main) and 'conv' in event.name else None
        return ProfiledKernel(
            self._direction(event, phase, pass_span, place), phase.names[0] if phase else '',
            int(pass_span.names[0]) if pass_span else -1, place,
            main.name if convolution else event.name, _own_op(event),
            str(convolution) if convolution else describe_shapes(event),
            convolution if is_main else None, dtype_of(main), name,
            event.time_range.start - self.start_us, microseconds)

    def _spans(self, kind: str) -> list[_Span]:
        spans = []
        for event in self.events:
            parts = labels.read_label(event.name)
            if parts and parts[0] == kind:
                spans.append(_Span(event.time_range.start, event.time_range.end, parts[1:]))
        return spans

    def _within(self, spans: Sequence[_Span], event: FunctionEvent) -> _Span | None:
        """The span at the time of the event: other threads (backward pass on a GPU) have no labels."""
        start = event.time_range.start
        i = bisect.bisect_right(spans, start, key=lambda span: span.start) - 1
        return spans[i] if i >= 0 and start <= spans[i].end else None

    def _find_creators(self) -> dict[int, tuple[list[int], list[FunctionEvent]]]:
        """Thread -> (sequence numbers, operations that created the nodes of these numbers), both ascending.

        An operation has the number of the next node, so the last one with a number created that node.
        """
        last: dict[int, dict[int, FunctionEvent]] = defaultdict(dict)
        for event in self.events:
            if event.sequence_nr >= 0 and event.scope != BACKWARD_SCOPE and not event.name.startswith(NODE):
                last[event.thread][event.sequence_nr] = event
        return {thread: tuple(map(list, zip(*sorted(found.items()), strict=True)))
                for thread, found in last.items()}

    def _nodes_before(self) -> dict[int, FunctionEvent]:
        """id of the evaluation of a node -> the evaluation before it in the same thread."""
        before, previous = {}, {}
        for event in self.events:
            if event.name.startswith(NODE):
                if event.thread in previous:
                    before[id(event)] = previous[event.thread]
                previous[event.thread] = event
        return before

    def _place(self, event: FunctionEvent) -> Place | None:
        """The layer of an event, None outside of all."""
        for outer in _ancestors(event):
            parts = labels.read_label(outer.name)
            if parts and parts[0] == labels.LAYER:
                op = _outermost_operation(event, outer)
                return Place(parts[1], parts[2], _layer_before(op, outer), op.name)
            if outer.name.startswith(NODE):
                return self._place_of_node(outer)
        return None

    def _place_of_node(self, node: FunctionEvent) -> Place | None:
        if id(node) not in self._places:
            # Gradients are accumulated right after the node that completes them.
            seen = [node]
            while seen[-1].sequence_nr < 0 and id(seen[-1]) in self._before:
                seen.append(self._before[id(seen[-1])])
            creator = self._creator(seen[-1])
            place = Place('', UNKNOWN) if creator is None else self._place(creator)
            self._places.update((id(each), place) for each in seen)
        return self._places[id(node)]

    def _creator(self, node: FunctionEvent) -> FunctionEvent | None:
        numbers, events = self._creators.get(node.fwd_thread, ((), ()))
        # Some operations create several nodes and have the number of the first.
        i = bisect.bisect_right(numbers, node.sequence_nr) - 1
        return events[i] if node.sequence_nr >= 0 and i >= 0 else None

    def _place_outside(self, event: FunctionEvent, phase: _Span | None, pass_span: _Span | None) -> Place:
        if any(e.name.startswith(OPTIMIZER) for e in _ancestors(event)):
            return Place('', OPTIMISER)
        if any(labels.read_label(e.name) == [labels.DATA] for e in _ancestors(event)):
            return Place('', INPUT)
        if pass_span is not None:
            return Place('', LOSS)
        if phase is not None:
            return Place('', GRADIENTS)
        if self._phases and event.time_range.start > self._phases[-1].end:
            return Place('', UPDATE)
        return Place('', LATENTS)

    def _direction(
        self, event: FunctionEvent, phase: _Span | None, pass_span: _Span | None, place: Place,
    ) -> str:
        if any(e.name.startswith(NODE) for e in _ancestors(event)):
            return BPROP
        if place.path in (INPUT, LATENTS) and not place.network:
            return INPUT
        return FPROP if pass_span is not None else OPTIMISER


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The event itself and everything around it, innermost first."""
    outer: Any = event
    while outer is not None:
        yield outer
        outer = outer.cpu_parent


def _unknown_kernel(microseconds: float) -> ProfiledKernel:
    """Stands for the kernels that the profiler saw but could not link to the call that launched them."""
    return ProfiledKernel(
        UNKNOWN, '', -1, Place('', UNKNOWN), UNKNOWN, '', '', None, '', 'all not linked to an operation', 0.0,
        microseconds)


def _is_work(name: str) -> bool:
    """Whether it is a kernel: labels also appear on the GPU's timeline."""
    return labels.read_label(name) is None and not name.startswith((OPTIMIZER, 'ProfilerStep'))


def _own_op(event: FunctionEvent) -> str:
    """Name of our operator around the event or, if the event calls one, directly inside; '' for none."""
    inside = event.cpu_children if event.kernels else []
    for other in [*_ancestors(event), *inside]:
        parts = labels.read_label(other.name)
        if parts and parts[0] == labels.OP:
            return parts[1]
    return ''


def _outermost_operation(event: FunctionEvent, layer: FunctionEvent) -> FunctionEvent:
    """The event or its ancestor that the layer calls directly."""
    return next(e for e in _ancestors(event) if e is layer or e.cpu_parent is layer)


def _layer_before(op: FunctionEvent, layer: FunctionEvent) -> str:
    """Path of the last layer that finished before the operation, in the module that calls both."""
    before = ''
    for sibling in layer.cpu_children:
        parts = labels.read_label(sibling.name)
        if parts and parts[0] == labels.LAYER and sibling.time_range.end <= op.time_range.start:
            before = parts[2]
    return before


Naming = Callable[[ProfiledKernel], str]
# Textbook names of the parts of a step, by phase and pass.
PARTS = {('Dmain', 0): 'Part1:Real', ('Dmain', 1): 'Part1:Fake', ('Gmain', 0): 'Part2:Fake'}
STEPS = {'Dmain': 'Part1', 'Gmain': 'Part2'}
LAYERS = {'conv': 'Conv', 'bn': 'BN'}
FUNCTIONS = {'aten::relu': 'ReLU', 'aten::leaky_relu': 'LeakyReLU', 'aten::tanh': 'Tanh',
             'aten::contiguous': 'Layout', 'aten::flatten': 'Flatten', 'aten::to': 'Layout'}


def naming_of(system: str, own_network: Mapping[str, str]) -> Naming:
    """The naming for a system; 'dcgan' has its own.

    own_network: phase -> name of the network that it trains, which StyleGAN names omit.
    """
    return textbook_name if system == 'dcgan' else lambda kernel: dotted_name(kernel, own_network)


def dotted_name(kernel: ProfiledKernel, own_network: Mapping[str, str]) -> str:
    """phase:path of the module, with the network before the path if the phase trains another one."""
    place = kernel.place
    is_own = place.network == own_network.get(kernel.phase)
    path = '.'.join(part for part in ('' if is_own else place.network, place.path) if part)
    # The phase's own network as a whole has no path.
    return ':'.join(part for part in (kernel.phase, path or place.network) if part)


def textbook_name(kernel: ProfiledKernel) -> str:
    """Part1 trains D on a real and a fake batch, Part2 trains G; layers are numbered.

    Operations between layers have the number of the layer before.
    """
    place = kernel.place
    part = PARTS.get((kernel.phase, kernel.pass_index), STEPS.get(kernel.phase, kernel.phase))
    layer = (_layer(place.path) or _function(kernel)) if place.network else place.path
    return ':'.join(name for name in (part, place.network, layer) if name)


def is_named(kernel: ProfiledKernel) -> bool:
    """Whether the layer or other part of the step that the kernel belongs to is known."""
    return kernel.place.path != UNKNOWN


def _layer(path: str) -> str:
    """'Conv2' for synthesis.conv2; '' for anything but a numbered layer."""
    found = re.fullmatch(r'([a-z]+)(\d+)', path.rpartition('.')[2])
    return LAYERS.get(found[1], found[1]) + found[2] if found else ''


def _function(kernel: ProfiledKernel) -> str:
    name = FUNCTIONS.get(kernel.place.op, kernel.place.op.rpartition('::')[2])
    number = re.search(r'\d+$', kernel.place.after)
    return name + (number[0] if number else '')
