# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs do, on a CPU: a capture keeps operators and addresses, and forgets the Python around them.

A replay runs the same operators on the same memory. Whatever Python decided at the capture is frozen, just as
on a GPU, so a result that should have followed a later decision comes out wrong.
"""
import contextlib
import functools
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torch_utils import host_draws

RANDOM = {'rand', 'randn', 'rand_like', 'randn_like', 'randint', 'normal_', 'uniform_', 'bernoulli_'}
# What a capture refuses besides: tensors made of Python's numbers, which the host copies to the device.
COPYING = {'lift_fresh'}
CONVOLUTIONS = {'convolution', 'convolution_backward'}
WAITING = {'_local_scalar_dense', 'item', 'nonzero', 'equal', 'masked_select', 'is_nonzero', 'unique'}


def tensors_in(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [tensor for item in tree for tensor in tensors_in(item)]
    return []


def storages(tree):
    return {t.untyped_storage().data_ptr() for t in tensors_in(tree)}


@functools.cache
def name_of(func):
    return func.overloadpacket.__name__


@functools.cache
def changes_inputs(func):
    return func._schema.is_mutable


def signature(name, args):
    """By what cuDNN's choices are remembered, in each thread: backward passes have one of their own."""
    is_backward = torch._C._current_graph_task_id() != -1
    return (is_backward, name, *((tuple(arg.shape), arg.stride(), arg.dtype) if isinstance(arg, torch.Tensor)
                                 else str(arg) for arg in args))


def live_accumulators(parameters):
    """Those whose AccumulateGrad node something holds, such as a graph of autograd that was kept."""
    def node_of(parameter):
        return torch.autograd.graph.get_gradient_edge(parameter).node
    live = []
    for parameter in parameters:
        was_required = parameter.requires_grad
        parameter.requires_grad_(True)
        # A node that nobody else holds is gone, with its mark, before it is asked for again.
        node_of(parameter).metadata['seen'] = True
        if node_of(parameter).metadata.pop('seen', False):
            live.append(parameter)
        parameter.requires_grad_(was_required)
    return live


def refuse_copy(*args):
    raise RuntimeError('a copy from the host within a capture would be repeated from where it lay')


class Device(TorchDispatchMode):
    """A GPU as far as random numbers go: those of the host come from another generator than its own.

    Inside it all works as on a GPU, and an operator for which the host would wait is an error.
    """

    def __init__(self, seed=0, allow_waiting=True):
        super().__init__()
        self.seed(seed)
        self.allow_waiting = allow_waiting
        self.is_capturing, self.algorithms = False, set()

    def seed(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = name_of(func)
        if host_draws.is_drawing():
            return func(*args, **(kwargs or {}))
        if name in CONVOLUTIONS:
            self._choose_algorithm(signature(name, args))
        if not self.allow_waiting and name in WAITING:
            raise RuntimeError(f'the host would wait for {name}')
        if name not in RANDOM:
            return func(*args, **(kwargs or {}))
        host = torch.get_rng_state()
        torch.set_rng_state(self.state)
        result = func(*args, **(kwargs or {}))
        self.state = torch.get_rng_state()
        torch.set_rng_state(host)
        return result

    def _choose_algorithm(self, key):
        if self.is_capturing and key not in self.algorithms:
            raise RuntimeError(f'cuDNN would try algorithms within a capture for {key}')
        self.algorithms.add(key)

    @contextlib.contextmanager
    def running(self):
        """Work on this device."""
        with self, host_draws.force_static():
            yield self


class _Recorder(TorchDispatchMode):
    """Runs operators, keeps them for replay, and keeps what they overwrite of older memory."""

    def __init__(self, fail_after=None):
        super().__init__()
        self.calls, self.before, self.own, self.fail_after = [], {}, set(), fail_after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in([*args, *kwargs.values()])
        if name_of(func) in WAITING | COPYING:
            raise RuntimeError(f'operation not permitted when stream is capturing: {func}')
        if changes_inputs(func):
            for t in given:
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        if len(self.calls) == self.fail_after:
            raise RuntimeError('operation not permitted when stream is capturing\nand more')
        result = func(*args, **kwargs)
        old = storages(given)
        # Views and what is written in place need no copy when they are made again.
        fresh = [t.untyped_storage().data_ptr() not in old for t in tensors_in(result)]
        self.own |= storages(result) - old
        # The same memory, without what autograd knows of it.
        plain = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, result))
        self.calls.append((func, *plain, fresh))
        return result


def run_again(calls):
    for func, args, kwargs, result, fresh in calls:
        new = func(*args, **kwargs)
        if any(fresh):
            for place, value, is_fresh in zip(tensors_in(result), tensors_in(new), fresh, strict=True):
                if is_fresh:
                    place.copy_(value)


class StandIn:
    """A Backend on a CPU, which refuses in a capture what a GPU does.

    fail_at: number of the capture that fails, from 1 on.  fail_after: how many operations it gets to; None:
    it fails when it ends.  parameters: none may have an AccumulateGrad node from before a capture, which on a
    GPU would belong to another stream.
    """

    def __init__(self, device, fail_at=None, fail_after=None, parameters=()):
        self.device, self.fail_at, self.fail_after, self.parameters = device, fail_at, fail_after, parameters
        self.num_captures, self.num_warm_ups, self.num_replays = 0, 0, 0

    def warm_up(self, function):
        self.num_warm_ups += 1
        return function()

    def capture(self, function):
        self.num_captures += 1
        fails = self.num_captures == self.fail_at
        recorder, generator = _Recorder(self.fail_after if fails else None), self.device.state.clone()
        if live_accumulators(self.parameters):
            raise RuntimeError('AccumulateGrad nodes belong to the stream of an earlier pass')
        self.device.is_capturing = True
        try:
            with recorder, mock.patch.object(host_draws, 'to_device', refuse_copy):
                result = function()
            if fails:
                raise RuntimeError('operation not permitted when stream is capturing\nand more')
        finally:
            # A capture runs nothing, neither when it succeeds nor when it fails.
            self.device.is_capturing, self.device.state = False, generator
            for storage, values in recorder.before.values():
                storage.copy_(values)
        return lambda: self.replay(recorder.calls), result

    def get_state(self):
        return self.device.state.clone()

    def set_state(self, state):
        self.device.state = state.clone()

    def replay(self, calls):
        self.num_replays += 1
        with torch.no_grad():
            run_again(calls)
