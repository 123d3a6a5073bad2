# SPDX-License-Identifier: Apache-2.0
"""Up-sample, filter, down-sample."""
import torch
import torch.nn.functional as F


def setup_filter(
    f, device=torch.device('cpu'), normalize=True, flip_filter=False, gain=1, separable=None,  # noqa: B008
):
    """A filter as a tensor; two-dimensional unless it is long."""
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    f = f[None] if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    f = f / f.sum() if normalize else f
    f = f.flip(list(range(f.ndim))) if flip_filter else f
    return (f * gain ** (f.ndim / 2)).to(device)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _four(padding):
    padding = _pair(padding)
    return padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def _size(f):
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl='cuda'):
    """x [N, C, H, W]; padding of the up-sampled image."""
    assert f is None or f.dtype == torch.float32
    f = torch.ones([1, 1], device=x.device) if f is None else f
    (up_x, up_y), (down_x, down_y), pads = _pair(up), _pair(down), _four(padding)
    n, c, h, w = x.shape
    stuffed = x.new_zeros([n, c, h, up_y, w, up_x])
    stuffed[:, :, :, 0, :, 0] = x
    x = F.pad(stuffed.reshape(n, c, h * up_y, w * up_x), pads)
    f = f * gain ** (f.ndim / 2)
    f = (f if flip_filter else f.flip(list(range(f.ndim)))).to(x.dtype)
    f = torch.outer(f, f) if f.ndim == 1 else f
    x = F.conv2d(x, f.expand(c, 1, -1, -1), groups=c)
    return x[:, :, ::down_y, ::down_x]


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl='cuda'):
    """The same size."""
    (fw, fh), (x0, x1, y0, y1) = _size(f), _four(padding)
    pads = [x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl='cuda'):
    """Larger."""
    (ux, uy), (fw, fh), (x0, x1, y0, y1) = _pair(up), _size(f), _four(padding)
    pads = [x0 + (fw + ux - 1) // 2, x1 + (fw - ux) // 2, y0 + (fh + uy - 1) // 2, y1 + (fh - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=pads, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl='cuda'):
    """Smaller."""
    (dx, dy), (fw, fh), (x0, x1, y0, y1) = _pair(down), _size(f), _four(padding)
    pads = [x0 + (fw - dx + 1) // 2, x1 + (fw - dx) // 2, y0 + (fh - dy + 1) // 2, y1 + (fh - dy) // 2]
    return upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter, gain=gain)
