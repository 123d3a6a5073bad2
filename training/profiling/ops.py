# SPDX-License-Identifier: Apache-2.0
"""Operations in a profile: kernels and their wrappers, with shapes, arithmetic and kind of work."""
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch.autograd.profiler_util import FunctionEvent

from training.profiling.labels import read_label

# Operations that only call others, which the profile also lists.
WRAPPERS = frozenset(f'aten::{name}' for name in [
    'to', '_to_copy', 'contiguous', 'clone', 'reshape', 'flatten', 'linear', 'matmul', 'conv2d',
    'conv_transpose2d', 'convolution', '_convolution', '_convolution_double_backward', 'batch_norm',
    '_batch_norm_impl_index', '_batch_norm_impl_index_backward', 'instance_norm', 'layer_norm',
    'binary_cross_entropy_with_logits', 'type_as', 'repeat', 'sum_to_size', 'expand_as', 'pad',
    'upsample_nearest2d', '_foreach_add_', 'item', 'broadcast_tensors'])
# Operations that create views, or allocate memory.
VIEWS = frozenset(f'aten::{name}' for name in [
    'view', 'as_strided', 'as_strided_', 't', 'transpose', 'permute', 'expand', 'unsqueeze', 'squeeze',
    'detach', 'detach_', 'select', 'slice', 'narrow', 'split', 'split_with_sizes', 'chunk', 'unbind', 'alias',
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'resize_', 'set_', 'lift_fresh',
    'resolve_conj', 'resolve_neg', '_reshape_alias', '_unsafe_view', 'unfold', 'is_nonzero', 'view_as',
    '_nnpack_available', 'requires_grad_', 'result_type', 'promote_types', 'movedim', 'real'])
NO_OPERATIONS = ('autograd', 'torch', 'profiler')  # namespaces of events that only call operations

CONVOLUTION, FILTER, PRODUCT, REDUCTION = 'convolution', 'resampling filter', 'matrix product', 'reduction'
NORMALISATION, COPY, RANDOM, ELEMENTWISE = 'normalisation', 'memory copy', 'random numbers', 'elementwise'
OPTIMISER = 'optimiser'
FILTERS = ('upfirdn2d', 'filtered')  # in the names of our operators
# The first word found in the name of a kernel or its operation decides.
GROUPS = (
    ('memcpy', COPY), ('memset', COPY), ('conv', CONVOLUTION), ('batch_norm', NORMALISATION),
    ('var_mean', NORMALISATION), ('addmm', PRODUCT), ('aten::mm', PRODUCT), ('bmm', PRODUCT),
    ('aten::mv', PRODUCT), ('copy', COPY), ('aten::cat', COPY), ('clone', COPY), ('contiguous', COPY),
    ('stack', COPY), ('fill_', COPY), ('zero', COPY), ('aten::ones', COPY), ('rand', RANDOM),
    ('normal_', RANDOM), ('uniform_', RANDOM), ('sum', REDUCTION), ('mean', REDUCTION), ('norm', REDUCTION),
    ('amax', REDUCTION), ('::std', REDUCTION), ('::var', REDUCTION),
)


@dataclass(frozen=True)
class Convolution:
    """Arguments of a convolution: x [N, C, H, W], weight with K feature maps and RxS taps, result [N, K, P,
    Q].

    gradients: computed instead of the result, of 'data', 'weight', 'bias'; empty: the result.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    P: int
    Q: int
    R: int
    S: int
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    is_transposed: bool
    gradients: tuple[str, ...] = ()

    @classmethod
    def of_event(cls, event: FunctionEvent) -> 'Convolution':
        """Read aten::convolution or aten::convolution_backward."""
        shapes, values = event.input_shapes, event.concrete_inputs
        if event.name == 'aten::convolution':
            (n, c, h, w), weight, spec = shapes[0], shapes[1], values[3:9]
            gradients: tuple[str, ...] = ()
        else:
            (n, c, h, w), weight, spec = shapes[1], shapes[2], values[4:10]
            kinds = zip(('data', 'weight', 'bias'), values[10], strict=True)
            gradients = tuple(kind for kind, is_wanted in kinds if is_wanted)
        stride, padding, dilation, is_transposed, output_padding, groups = spec
        # A single number applies to both axes.
        stride, padding, dilation, output_padding = (
            tuple(v) * (2 // len(v)) for v in (stride, padding, dilation, output_padding))
        taps = tuple(weight[2:])
        if is_transposed:
            p, q = [(size - 1) * stride[i] - 2 * padding[i] + dilation[i] * (taps[i] - 1) + output_padding[i]
                    + 1 for i, size in enumerate((h, w))]
        else:
            p, q = [(size + 2 * padding[i] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1
                    for i, size in enumerate((h, w))]
        k = weight[1] * groups if is_transposed else weight[0]
        return cls(n, c, h, w, k, p, q, *taps, padding, stride, dilation, groups, bool(is_transposed),
                   gradients)

    @property
    def flop(self) -> float:
        """Floating-point operations: two per product, without the bias."""
        positions = self.H * self.W if self.is_transposed else self.P * self.Q
        once = 2.0 * self.N * self.C * self.K // self.groups * self.R * self.S * positions
        return once * max(len({'data', 'weight'} & set(self.gradients)), 0 if self.gradients else 1)

    def __str__(self) -> str:
        sizes = ' '.join(f'{name}={value}' for name, value in self.sizes().items())
        return sizes + (' transposed' if self.is_transposed else '')

    def sizes(self) -> dict[str, Any]:
        """The arguments under their usual letters; dilation and groups only if not 1."""
        values = asdict(self)
        sizes = {name: values[name] for name in ('N', 'C', 'H', 'W', 'K', 'P', 'Q', 'R', 'S')}
        sizes |= {name: 'x'.join(map(str, values[name])) for name in ('padding', 'stride')}
        if set(self.dilation) != {1}:
            sizes['dilation'] = 'x'.join(map(str, self.dilation))
        return sizes | ({'groups': self.groups} if self.groups != 1 else {})


def is_operation(name: str) -> bool:
    """Whether an event is an operation on tensors, not a label or a part of autograd."""
    namespace, colons, _ = name.partition('::')
    return bool(colons) and namespace not in NO_OPERATIONS and read_label(name) is None and ' ' not in name


def is_convolution(event: FunctionEvent) -> bool:
    """Whether Convolution.of_event can read it: two spatial axes, arguments recorded."""
    if event.name not in ('aten::convolution', 'aten::convolution_backward'):
        return False
    return len(event.input_shapes[1]) == 4 and len(event.concrete_inputs or ()) > 8


def kernels_of(event: FunctionEvent) -> list[tuple[FunctionEvent, float]]:
    """The operations within an operation that do its work, with microseconds that add up to its own.

    Empty for views.
    """
    if event.name in VIEWS:
        return []
    if not _is_wrapper(event):
        return [(event, event.cpu_time_total)]
    inner = [pair for child in event.cpu_children for pair in kernels_of(child)]
    if not inner:
        return []
    # The wrapper's own time is added to its longest operation.
    rest = event.cpu_time_total - sum(microseconds for _, microseconds in inner)
    longest = max(range(len(inner)), key=lambda i: inner[i][1])
    inner[longest] = inner[longest][0], inner[longest][1] + max(rest, 0.0)
    return inner


def _is_wrapper(event: FunctionEvent) -> bool:
    if not is_operation(event.name):
        return True
    if 'conv' in event.name:
        # The nesting of convolutions depends on the backend.
        return _contains_convolution(event) or event.name == 'aten::_convolution_double_backward'
    return event.name in WRAPPERS


def _contains_convolution(event: FunctionEvent) -> bool:
    return any(('conv' in child.name and child.name != 'aten::resolve_conj') or _contains_convolution(child)
               for child in event.cpu_children)


def describe_shapes(event: FunctionEvent) -> str:
    """Shapes of the tensors among the arguments: '4x128, 128x128'; '-' for a tensor without axes or none."""
    shapes = list(event.input_shapes or [])
    while shapes and not shapes[-1]:
        shapes.pop()
    return ', '.join(_shape(shape) for shape in shapes)


def _shape(shape: Sequence[Any]) -> str:
    # A list of tensors, as in an optimizer: show their number and total size.
    if shape and isinstance(shape[0], (list, tuple)):
        return f'{len(shape)} tensors of {sum(prod(s) for s in shape)} numbers'
    return 'x'.join(map(str, shape)) or '-'


def dtype_of(event: FunctionEvent) -> str:
    """Element type of the first tensor argument, such as 'float' or 'c10::Half'; '' if not recorded."""
    return next((name for name in getattr(event, 'input_dtypes', None) or [] if name), '')


def group_of(op: str, kernel: str, own_op: str) -> str:
    """What kind of work a kernel is.  own_op: the operator of torch_utils.ops around it, or ''."""
    if any(name in own_op for name in FILTERS) and 'conv' in op:
        return FILTER
    text = f'{kernel} {op}'.lower().replace('resolve_conj', '')
    if 'upfirdn' in text or (op == kernel == own_op and any(name in own_op for name in FILTERS)):
        return FILTER
    return next((group for word, group in GROUPS if word in text), ELEMENTWISE)
