# SPDX-License-Identifier: Apache-2.0
"""Transfer learning: fitting tensors of a trained network to other shapes.

Wherever possible the network still computes the same function: weights are rescaled to compensate for the
gains of equalised learning rates, which depend on the number of inputs, and new inputs start at zero.
"""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dnnlib.resolution import height_width

COLOUR_PLANES = {1: 1, 2: 1, 3: 3, 4: 3}  # channels of an image -> those that are not alpha


@dataclass(frozen=True)
class Pair:
    """Two tensors of the same name: `old` of the network `source`, `new` fresh in `target`.

    Both lie on the CPU. Neither is changed.
    """

    name: str
    old: torch.Tensor
    new: torch.Tensor
    source: torch.nn.Module
    target: torch.nn.Module


@dataclass(frozen=True)
class Fit:
    """The result for a pair. value: of the shape of `new`; None: keep the fresh tensor.
    how: a description, empty if `old` is copied unchanged.
    """

    value: torch.Tensor | None
    how: str = ''


def fit_tensor(pair: Pair) -> Fit:
    """The value for the tensor of the new network."""
    if pair.old.shape == pair.new.shape and not _is_bias_of_other_image(pair):
        return Fit(pair.old)
    rule = next(rule for pattern, rule in RULES if re.search(pattern, pair.name))
    return rule(pair)


def image_map(old: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix [new, old], offset [new]) that turn an image of `old` channels in [-1, 1] into one of `new`.

    Gray becomes R = G = B, colour its mean, a missing alpha opaque. With more than 4 channels, channels of
    equal index correspond and the others are 0.
    """
    if old not in COLOUR_PLANES or new not in COLOUR_PLANES:
        return torch.eye(new, old), torch.zeros([new])
    matrix, offset = torch.zeros([new, old]), torch.zeros([new])
    planes_old, planes_new = COLOUR_PLANES[old], COLOUR_PLANES[new]
    same = planes_old == planes_new
    colours = torch.eye(planes_new) if same else torch.full([planes_new, planes_old], 1 / planes_old)
    matrix[:planes_new, :planes_old] = colours
    # Alpha is the last channel of images of 2 or 4.
    if new > planes_new:
        if old > planes_old:
            matrix[-1, -1] = 1
        else:
            offset[-1] = 1
    return matrix, offset


def resize_plane(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[..., h, w] -> [..., height, width], bilinear."""
    planes = x.reshape(1, -1, *x.shape[-2:]).to(torch.float32)
    planes = torch.nn.functional.interpolate(planes, size=(height, width), mode='bilinear')
    return planes.reshape(*x.shape[:-2], height, width)


def overlap(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A copy of `new` with the values of `old` wherever both have an element; the ranks must be equal."""
    common = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
    value = new.detach().clone()
    value[common] = old[common].to(value.dtype)
    return value


def _is_bias_of_other_image(pair: Pair) -> bool:
    # The bias of D's first layer has the same shape for all images, but must absorb a constant alpha.
    return (pair.name.endswith('fromrgb.bias')
            and pair.source.img_channels != pair.target.img_channels)


def _stays_fresh(reason: str) -> Callable[[Pair], Fit]:
    def rule(pair: Pair) -> Fit:
        return Fit(None, reason)
    return rule


def _cut(pair: Pair) -> Fit:
    """Different numbers of feature maps: copy those with equal indices."""
    if pair.old.ndim != pair.new.ndim:
        return Fit(None, 'different number of axes')
    fits_inside = all(a >= b for a, b in zip(pair.old.shape, pair.new.shape, strict=True))
    return Fit(overlap(pair.old, pair.new), 'first part taken' if fits_inside else 'common part, rest fresh')


def _resize_noise(pair: Pair) -> Fit:
    """Resize the noise and restore its mean and deviation, since resizing smooths it."""
    value = resize_plane(pair.old, *pair.new.shape)
    mean, deviation = pair.old.mean(), pair.old.std(unbiased=False)
    value = (value - value.mean()) / value.std(unbiased=False).clamp(min=1e-8)
    return Fit(value * deviation + mean, 'bilinear, same deviation')


def _resize_const(pair: Pair) -> Fit:
    return Fit(overlap(resize_plane(pair.old, *pair.new.shape[1:]), pair.new), 'bilinear')


def _resize_epilogue(pair: Pair) -> Fit:
    """D's fully connected layer reads flattened [C, h, w]: resize its weight as an image [h, w]."""
    old_size, new_size = (height_width(net.b4.resolution) for net in (pair.source, pair.target))
    old = pair.old.unflatten(1, (-1, *old_size))  # [O, I, h, w]
    new = pair.new.unflatten(1, (-1, *new_size))
    # Compensates for the number of positions in the sum, together with the gain, which contains its root.
    scale = math.sqrt(math.prod(old_size) / math.prod(new_size))
    value = old if old_size == new_size else resize_plane(old, *new_size) * scale
    return Fit(overlap(value, new).flatten(1), 'bilinear' if old_size != new_size else 'common part')


def _cut_deviation_last(pair: Pair) -> Fit:
    """D's last convolution, whose last input is the minibatch standard deviation."""
    value = overlap(pair.old[:, :-1], pair.new[:, :-1])
    deviation = overlap(pair.old[:, -1:], pair.new[:, -1:])
    return Fit(torch.cat([value, deviation], dim=1), 'common part, rest fresh')


def _recolour_output(pair: Pair) -> Fit:
    """ToRGB for other channels: generates the corresponding image, by image_map()."""
    old, new = pair.source.img_channels, pair.target.img_channels
    if old == new:
        return _cut(pair)
    matrix, offset = image_map(old, new)
    how = f'image with {old} channels -> {new}'
    if pair.old.ndim > 1:
        return Fit(overlap(torch.einsum('no,oi...->ni...', matrix, pair.old), pair.new), how)
    # The image is the sum over all blocks, so the constant is added in one of them.
    first = next(name for name, _ in pair.target.named_parameters() if name.endswith('torgb.bias'))
    return Fit(matrix @ pair.old + offset * (pair.name == first), how)


def _recolour_input(pair: Pair) -> Fit:
    """FromRGB for other channels: responds as to the corresponding image, by image_map()."""
    old, new = pair.source.img_channels, pair.target.img_channels
    if old == new:
        return _cut(pair)
    matrix, offset = image_map(new, old)
    how = f'image with {old} channels -> {new}'
    if pair.old.ndim > 1:
        value = torch.einsum('oc...,cn->on...', pair.old, matrix) * math.sqrt(new / old)
        return Fit(overlap(value, pair.new), how)
    if not offset.any():
        return Fit(pair.old) if pair.old.shape == pair.new.shape else _cut(pair)
    layer = pair.source.get_submodule(pair.name.removesuffix('.bias'))
    weight = layer.weight.detach().cpu().flatten(1)  # [O, C]
    return Fit(overlap(pair.old + weight @ offset / math.sqrt(old), pair.new), f'{how}, alpha as opaque')


def _resize_embedding(pair: Pair) -> Fit:
    """Labels with equal indices keep their embedding; new ones get a fresh one."""
    (width, old), (new_width, new) = pair.old.shape, pair.new.shape
    if width != new_width:
        return Fit(None, 'different w_dim')
    return Fit(overlap(pair.old * math.sqrt(new / old), pair.new), f'{min(old, new)} of {new} labels taken')


def _resize_first_layer(pair: Pair) -> Fit:
    """z keeps its influence, with or without a label; the weights of a new label start at 0."""
    z_dim = pair.source.mapping.z_dim
    if z_dim != pair.target.mapping.z_dim or len(pair.old) != len(pair.new) or z_dim == 0:
        return Fit(None, 'different z_dim or w_dim')
    value = torch.zeros_like(pair.new)
    value[:, :z_dim] = pair.old[:, :z_dim] * math.sqrt(pair.new.shape[1] / pair.old.shape[1])
    return Fit(value, 'the part for z')


def _cut_affine(pair: Pair) -> Fit:
    if pair.old.shape[1] != pair.new.shape[1]:
        return Fit(None, 'different w_dim')
    return _cut(pair)


def _cut_output(pair: Pair) -> Fit:
    """D's last layer: a logit if unconditional, else a vector to be projected on the label embedding."""
    if 1 in (len(pair.old), len(pair.new)):
        return Fit(None, 'conditional and unconditional outputs differ')
    return _cut(pair)


# The first pattern found in the name of a tensor decides; used only if shapes differ.
RULES: list[tuple[str, Callable[[Pair], Fit]]] = [
    (r'resample_filter$', _stays_fresh('a setting of this run')),
    (r'noise_const$', _resize_noise),
    (r'^mapping\.embed\.weight$', _resize_embedding),
    (r'^mapping\.fc0\.weight$', _resize_first_layer),
    (r'^mapping\.', _stays_fresh('different mapping network')),
    (r'affine\.weight$', _cut_affine),
    (r'torgb\.(weight|bias)$', _recolour_output),
    (r'fromrgb\.(weight|bias)$', _recolour_input),
    (r'^synthesis\.b4\.const$', _resize_const),
    (r'^b4\.conv\.weight$', _cut_deviation_last),
    (r'^b4\.fc\.weight$', _resize_epilogue),
    (r'^b4\.out\.', _cut_output),
    (r'', _cut),
]
