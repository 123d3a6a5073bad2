# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs do, on a CPU: a capture keeps operators and addresses, and forgets the Python around them.

A replay runs the same operators on the same memory. Whatever Python decided at the capture is frozen, just as
on a GPU, so a result that should have followed a later decision comes out wrong.
"""
import contextlib
import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils import host_draws

RANDOM = {'rand', 'randn', 'rand_like', 'randn_like', 'randint', 'normal_', 'uniform_', 'bernoulli_'}
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


class Device(TorchDispatchMode):
    """A GPU as far as random numbers go: those of the host come from another generator than its own.

    Inside it all works as on a GPU, and an operator for which the host would wait is an error.
    """

    def __init__(self, seed=0, allow_waiting=True):
        super().__init__()
        self.seed(seed)
        self.allow_waiting = allow_waiting

    def seed(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = name_of(func)
        if host_draws.is_drawing():
            return func(*args, **(kwargs or {}))
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

    @contextlib.contextmanager
    def running(self):
        """Work on this device."""
        with self, host_draws.force_static():
            yield self


class _Recorder(TorchDispatchMode):
    """Runs operators, keeps them for replay, and keeps what they overwrite of older memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in([*args, *kwargs.values()])
        if changes_inputs(func):
            for t in given:
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        old = storages(given)
        # Views and what is written in place need no copy when they are made again.
        fresh = [t.untyped_storage().data_ptr() not in old for t in tensors_in(result)]
        self.own |= storages(result) - old
        self.calls.append((func, args, kwargs, result, fresh))
        return result


def run_again(calls):
    for func, args, kwargs, result, fresh in calls:
        new = func(*args, **kwargs)
        if any(fresh):
            for place, value, is_fresh in zip(tensors_in(result), tensors_in(new), fresh, strict=True):
                if is_fresh:
                    place.copy_(value)


class StandIn:
    """A Backend on a CPU. fail_at: number of the capture that fails, from 1 on, half through its work."""

    def __init__(self, device, fail_at=None):
        self.device, self.fail_at, self.num_captures, self.num_replays = device, fail_at, 0, 0

    def capture(self, function):
        self.num_captures += 1
        recorder, generator = _Recorder(), self.device.state.clone()
        try:
            with recorder:
                result = function()
                if self.num_captures == self.fail_at:
                    raise RuntimeError('operation not permitted when stream is capturing\nand more')
        finally:
            # A capture runs nothing, neither when it succeeds nor when it fails.
            self.device.state = generator
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
