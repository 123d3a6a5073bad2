# SPDX-License-Identifier: Apache-2.0
"""Counts what operations move and compute, on the meta device: bytes, FLOPs, calls by phase, layer and kind.

A GPU is what is counted for: code that asks for the device sees one that is not a CPU.
"""
import collections
import contextlib
import math
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils import custom_ops
from torch_utils.ops._registry import Op

REDUCTIONS = frozenset([
    'sum', 'mean', 'amax', 'amin', 'max', 'min', 'prod', 'any', 'all', 'norm', 'linalg_vector_norm', 'var'])
COPIES = frozenset([
    '_to_copy', 'copy', 'clone', 'cat', 'stack', 'repeat', 'flip', 'constant_pad_nd', 'reflection_pad2d',
    'reflection_pad2d_backward', 'index_select', 'index_copy', 'slice_backward', 'select_backward'])
FILLS = frozenset([
    'fill', 'zero', 'zeros', 'ones', 'full', 'zeros_like', 'ones_like', 'full_like', 'new_zeros', 'new_ones',
    'new_full', 'arange', 'scalar_tensor', 'randn', 'randn_like', 'rand', 'rand_like', 'normal', 'uniform'])
PRODUCTS = frozenset(['mm', 'addmm', 'bmm', 'baddbmm'])
OVERWRITING = frozenset(['copy_', 'fill_', 'zero_', 'normal_', 'uniform_'])  # do not read what they change
DTYPES = {torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.float32: 'fp32', torch.float64: 'fp64'}
TAPES = (torch.nn.modules.module.register_module_forward_pre_hook,
         torch.nn.modules.module.register_module_forward_hook)


@dataclass(frozen=True)
class Call:
    """One operation, or several of the same size at the same place.

    way: forward, or backward for whatever runs inside of a backward pass.  layer: path of the module, that of
    the forward pass that is differentiated in a backward pass.  kind: of operation; op: its name.  dtype: of
    the arithmetic.
    """

    phase: str
    way: str
    layer: str
    kind: str
    op: str
    dtype: str
    bytes: int
    flop: int


def size_of(tensor):
    """Bytes of the elements of a tensor that are different places in memory."""
    return math.prod(
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.element_size()


class Recorder(TorchDispatchMode):
    """Within this context, what runs on meta tensors adds to `calls`: Call -> how many, by `weight`.

    networks: named modules whose paths are the layers; what runs in none of them has the layer `outside`.
    Operators of ours count as one pass over their arguments and results, whatever their CPU form does.
    """

    def __init__(self, networks):
        super().__init__()
        self.calls, self.phase, self.weight, self.outside = collections.Counter(), '', 1.0, 'step'
        self._names, self._owners = {}, {}
        for root, network in networks.items():
            for path, module in network.named_modules():
                self._names[module] = name = f'{root}.{path}'.removesuffix('.')
                self._owners |= {p: name for p in module.parameters(recurse=False)}
        # By the number that autograd gives to each node in the order of creation.
        self._layers, self._within, self._is_inside_op = {}, [], False
        self._numbered = torch.autograd._get_sequence_nr()
        self._context = contextlib.ExitStack()

    def __enter__(self):
        before = Op.run
        self._context.enter_context(mock.patch.object(
            Op, 'run', lambda op, *args: self._run_ours(before, op, args)))
        # What looks for kernels finds them; operators on meta tensors run none.
        self._context.enter_context(mock.patch.object(custom_ops, 'is_available', lambda device: True))
        # There is none for meta tensors.
        self._context.enter_context(mock.patch.object(
            torch, 'autocast', lambda *args, **kwargs: contextlib.nullcontext()))
        for register, hook in zip(TAPES, (self._enter_module, self._leave_module), strict=True):
            self._context.callback(register(hook).remove)
        return super().__enter__()

    def __exit__(self, *error):
        self._context.close()
        return super().__exit__(*error)

    @contextlib.contextmanager
    def within(self, phase, weight):
        """Count as part of a phase that runs in this share of the iterations."""
        before = self.phase, self.weight
        self.phase, self.weight = phase, weight
        yield
        self.phase, self.weight = before

    def add(self, kind, op, num_bytes, flop=0, dtype=torch.float32):
        """Count one operation at the place that is being computed."""
        node = torch._C._current_autograd_node()
        layer = self._layer(node)
        number = torch.autograd._get_sequence_nr()
        self._layers |= dict.fromkeys(range(self._numbered, number), layer)
        self._numbered = number
        if op is not None:
            way = 'forward' if node is None else 'backward'
            name = DTYPES.get(dtype, str(dtype).removeprefix('torch.'))
            self.calls[Call(self.phase, way, layer, kind, op, name, num_bytes, flop)] += self.weight

    def _layer(self, node):
        if node is None:
            return self._within[-1] if self._within else self.outside
        variable = getattr(node, 'variable', None)
        if variable is not None:
            return self._owners.get(variable, self.outside)
        return self._layers.get(node._sequence_nr(), self.outside)

    def _enter_module(self, module, _inputs):
        self.add(None, None, 0)  # what was created before does not belong to this module
        self._within.append(self._names.get(module, self._within[-1] if self._within else self.outside))

    def _leave_module(self, _module, _inputs, _outputs):
        self.add(None, None, 0)
        self._within.pop()

    def _run_ours(self, run, op, args):
        if args[0].device.type != 'meta' or self._is_inside_op:
            return run(op, *args)
        self._is_inside_op = True
        try:
            result = run(op, *args)
        finally:
            self._is_inside_op = False
        self.add(op.name, op.name, _bytes_of([*args, *_as_list(result)]), dtype=args[0].dtype)
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Called by torch for each operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = _on_meta(_as_list(result) if func._schema.returns else _changed(func, args))
        if self._is_inside_op or not outputs or func.is_view:
            return result
        name = func._schema.name.partition('::')[2]
        if name == 'convolution':
            result = _laid_out(result, args[:2])
            self._add_convolution('forward', args, [args[0], args[1], result])
        elif name == 'convolution_backward':
            result = (_laid_out(result[0], args[1:3]), *result[1:])
            self._add_convolution_backward(args, result)
        elif 'empty' not in name and not _is_alias(func, args, outputs):
            self._add_other(func, name, args, kwargs, outputs)
        return result

    def _add_other(self, func, name, args, kwargs, outputs):
        inputs = _on_meta([*args, *(v for k, v in kwargs.items() if k != 'out')])
        if name in OVERWRITING:
            inputs = inputs[1:]
        num_bytes = _bytes_of([*inputs, *outputs])
        bare = name.removesuffix('_')
        is_ours = func.namespace == 'stylegan2'
        kind = name if is_ours else _kind(bare)
        flop = _product_flop(args, outputs[0]) if kind == 'matmul' else 0
        self.add(kind, name, num_bytes, flop, outputs[0].dtype)

    def _add_convolution(self, way, args, tensors):
        x, w, *_, is_transposed, _, groups = args[:9]
        positions = x if is_transposed else tensors[-1]
        dtype = DTYPES[x.dtype]
        kind = f'{"convolution" if groups < x.shape[1] or groups == 1 else "depthwise"} {dtype}'
        flop = 2 * x.shape[0] * math.prod(positions.shape[2:]) * w.numel()
        self.add(kind, f'convolution {way}', _bytes_of(tensors), flop, x.dtype)

    def _add_convolution_backward(self, args, result):
        """The gradients of input and weight are kernels of their own."""
        dy, x, w, _, *geometry, mask = args
        forward = [x, w, None, *geometry]
        # The last of the tensors says how many positions there are.
        if mask[0]:
            self._add_convolution('to input', forward, [result[0], w, dy])
        if mask[1]:
            self._add_convolution('to weight', forward, [result[1], x, dy])
        if mask[2]:
            self.add('reduction', 'convolution to bias', _bytes_of([dy, result[2]]), dtype=dy.dtype)


def _as_list(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _on_meta(values):
    """The tensors on the meta device among values and the lists in them."""
    flat = [item for value in values for item in _as_list(value)]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.device.type == 'meta']


def _bytes_of(values):
    return sum(map(size_of, _on_meta(values)))


def _changed(func, args):
    """The arguments that an operation without results writes to."""
    return [value for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write]


def _is_alias(func, args, outputs):
    """Whether nothing is computed: the outputs are inputs under another shape."""
    if func._schema.is_mutable:
        return False
    storages = {t.untyped_storage()._cdata for t in _on_meta(args)}
    return all(t.untyped_storage()._cdata in storages for t in outputs)


def _kind(name):
    """Of an operation of torch."""
    for kind, names in (('reduction', REDUCTIONS), ('copy, cast', COPIES), ('fill, random', FILLS),
                        ('matmul', PRODUCTS)):
        if name in names:
            return kind
    return 'sampling' if name.startswith('grid_sampler') else 'elementwise'


def _product_flop(args, output):
    """The factors are the last two tensors of the arguments."""
    return 2 * output.numel() * _on_meta(args)[-1].shape[-2]


def _laid_out(result, operands):
    """Result of a convolution in the memory format that cuDNN gives it; torch's rule for meta tensors does
    not.
    """
    is_last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
                  for t in operands)
    if result is None or not is_last:
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)
