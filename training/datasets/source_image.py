# SPDX-License-Identifier: Apache-2.0
"""One image of a source, and what every source of dataset_tool provides."""
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from training.datasets.images import DEFAULT, Decoded, ImageError, Reading, read_image
from training.datasets.labels import Label
from training.datasets.transforms import Shape

Header = tuple[str, Shape | str]  # a name, and the shape or why the image cannot be read


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """An image as stored in its source: encoded bytes or pixels uint8 [H, W, C]; or why it cannot be read."""

    name: str
    label: Label | None
    data: bytes | np.ndarray | None
    is_rgb: bool = False  # always decoded to RGB, alpha dropped
    error: str | None = None
    reading: Reading = DEFAULT

    def decode(self) -> Decoded:
        """The pixels, and what there is to say. Raises ImageError if it cannot be decoded."""
        if self.error is not None:
            raise ImageError(self.error)
        if not isinstance(self.data, bytes):
            return Decoded(self.data)
        decoded = read_image(self.data, self.reading)
        pixels = decoded.pixels
        if not self.is_rgb or pixels.shape[2] == 3:
            return decoded
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2) if pixels.shape[2] < 3 else pixels[:, :, :3]
        return dataclasses.replace(decoded, pixels=pixels)


class DatasetSource(Protocol):
    """A sized iterable of SourceImage, in the order in which a dataset numbers them.

    on_error: 'stop' or 'skip' at unreadable images, by default. notes: lines for the user. class_names: of
    its labels, or None.
    """

    on_error: str
    notes: list[str]
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[SourceImage]: ...

    def headers(self) -> Iterator[Header]:
        """Names and shapes of the images, from what is cheap to read."""
        ...
