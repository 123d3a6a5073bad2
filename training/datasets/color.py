# SPDX-License-Identifier: Apache-2.0
"""Color profiles (ICC): pixels of any color space become sRGB."""
import functools
import io

import numpy as np
from PIL import Image, ImageCms

SAME_LEVELS = 2  # of 255: profiles that differ no more from sRGB are taken as sRGB
# Pillow's pixel format -> that in which its profile is applied.
PROFILE_MODES = {'1': 'L', 'L': 'L', 'LA': 'L', 'P': 'RGB', 'PA': 'RGB', 'RGB': 'RGB', 'RGBA': 'RGB',
                 'RGBX': 'RGB', 'CMYK': 'CMYK', 'YCbCr': 'RGB', 'LAB': 'LAB'}
CONVERTED = 'color profile converted to sRGB'
UNUSABLE = 'color profile ignored: it cannot be read or is for other pixels'


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """The image in sRGB, and a remark: CONVERTED, UNUSABLE, or None where the pixels stay as they are.

    Gray and colored modes keep their channels, with alpha; CMYK and LAB become RGB.
    """
    mode = PROFILE_MODES.get(image.mode)
    if not profile or mode is None:
        return image, None
    transform = _transform(profile, mode)
    if transform is None:
        return image, UNUSABLE
    if not changes_colors(profile, image.mode):
        return image, None
    has_alpha = image.mode in ('LA', 'PA', 'RGBA') or 'transparency' in image.info
    if has_alpha:
        image = image.convert('LA' if mode == 'L' else 'RGBA')
    alpha = image.getchannel('A') if has_alpha else None
    converted = _apply(transform, image if image.mode == mode else image.convert(mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted, CONVERTED


def changes_colors(profile: bytes, image_mode: str) -> bool:
    """Whether `to_srgb` would do or say anything about an image of this mode."""
    mode = PROFILE_MODES[image_mode]
    if _transform(profile, mode) is None:
        return True
    return mode in ('CMYK', 'LAB') or not _is_identity(profile, mode)


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    # Gray goes through RGB: there is no built-in profile for gray with the curve of sRGB.
    return converted.getchannel(0) if image.mode == 'L' else converted


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile('sRGB'), mode, 'RGB')
    # Pillow raises these for profiles that are damaged or made for another number of channels.
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


@functools.lru_cache(maxsize=16)
def _is_identity(profile: bytes, mode: str) -> bool:
    """Whether a profile is sRGB in effect, whatever its name; its pixels are then kept to the bit."""
    levels = np.arange(256, dtype=np.uint8)
    if mode == 'L':
        probe = levels[None]
    else:
        axis = levels[::17]  # 16 levels per channel
        probe = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(64, 64, 3)
    result = np.asarray(_apply(_transform(profile, mode), Image.fromarray(probe)))
    return bool((np.abs(result.astype(int) - probe) <= SAME_LEVELS).all())
