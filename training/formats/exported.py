# SPDX-License-Identifier: Apache-2.0
"""Export generators to other runtimes: ONNX and torch.export. Plain operators only, any batch size.

Both map z [N, z_dim] and, for conditional networks, c [N, c_dim] (float32) to img [N, C, H, W] in [-1, 1]
(float32, not clamped). Truncation and noise are fixed at export.
"""
import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dnnlib.util import UserError, replace_file
from torch_utils.ops._registry import Op
from training.systems.table import SYSTEMS

BATCH_SIZES = (1, 4)  # for the comparison with the network
MAX_DIFFERENCE = 1e-3  # of images in [-1, 1]
OPSET = 18
NEEDED = 'this needs more packages: pip install onnx onnxscript onnxruntime'


class ExportedGenerator(torch.nn.Module):
    """The exported module: latents to float32 images, with fixed truncation and noise ('const', 'none')."""

    def __init__(self, G: torch.nn.Module, truncation_psi: float = 1, noise_mode: str = 'const'):
        super().__init__()
        self.G, self.truncation_psi, self.noise_mode = G, truncation_psi, noise_mode

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """z [N, z_dim], c [N, c_dim] -> img [N, C, H, W]."""
        # Not fused: per-sample weights would fix the batch size in the shapes of convolutions.
        return self.G(z, c, truncation_psi=self.truncation_psi, noise_mode=self.noise_mode, force_fp32=True,
                      fused_modconv=False)

    def examples(self, batch: int) -> dict[str, torch.Tensor]:
        """Fixed inputs by name."""
        random = torch.Generator().manual_seed(batch)
        inputs = {'z': torch.randn([batch, self.G.z_dim], generator=random)}
        if self.G.c_dim:
            classes = torch.arange(batch) % self.G.c_dim
            inputs['c'] = torch.nn.functional.one_hot(classes, self.G.c_dim).to(torch.float32)
        return inputs


def write_onnx(path: str | os.PathLike, generator: ExportedGenerator) -> float | None:
    """Write an ONNX model; returns the largest difference of its images, None without onnxruntime.

    Raises UserError if packages are missing, the file cannot be written, or the images differ too much.
    """
    for package in ('onnx', 'onnxscript'):
        if optional(package) is None:
            raise UserError(f'{path}: {NEEDED}')
    program = _program(generator)
    inputs = generator.examples(2)
    with _quiet():
        # The exporter's optimizer drops the epsilon of 1e-8 that prevents a division by zero. Runtimes have
        # optimizers of their own.
        model = torch.onnx.export(
            program, tuple(inputs.values()), dynamo=True, input_names=list(inputs), output_names=['img'],
            opset_version=OPSET, dynamic_shapes=_per_argument(inputs, 'batch'), verbose=False, optimize=False)
    with replace_file(path) as temporary:
        model.save(str(temporary), external_data=False)
        return _check_onnx(Path(path), temporary, generator)


def write_torch_export(path: str | os.PathLike, generator: ExportedGenerator) -> float:
    """Write a torch.export program (.pt2); returns the largest difference of its images.

    It opens with torch.export.load() where this project is not installed. Raises UserError as write_onnx().
    """
    with torch.no_grad(), _quiet():
        # Decompose to the functional form, without in-place operators.
        program = _program(generator).run_decompositions({})
    with replace_file(path) as temporary, _quiet():
        # To memory first: torch checks the suffix of a file name, older releases the name itself.
        content = io.BytesIO()
        torch.export.save(program, content)
        content.seek(0)
        again = torch.export.load(content).module()
        temporary.write_bytes(content.getvalue())
        return _checked(Path(path), generator, lambda inputs: again(*inputs.values()))


def optional(package: str) -> ModuleType | None:
    """The module of an optional package, None if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


@torch.no_grad()
def _program(generator: ExportedGenerator) -> torch.export.ExportedProgram:
    if not isinstance(generator.G, tuple(system.generator for system in SYSTEMS.values())):
        raise UserError('only generators of this project can be exported, not a '
                        f'{type(generator.G).__name__}')
    inputs, batch = generator.examples(2), torch.export.Dim('batch')
    with _plain_operators(), _quiet():
        return torch.export.export(
            generator.eval(), tuple(inputs.values()), dynamic_shapes=_per_argument(inputs, batch))


def _per_argument(inputs: dict[str, Any], batch: Any) -> dict[str, Any]:
    return {name: {0: batch} for name in inputs}


@contextlib.contextmanager
def _plain_operators() -> Iterator[None]:
    """Trace the reference code of our operators instead of the operators, which other runtimes lack."""
    package = Op.__module__.rpartition('.')[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(package)]
    found = {id(op): op for module in modules for op in vars(module).values() if isinstance(op, Op)}
    saved = [(op, op.overload) for op in found.values()]
    try:
        for op, _ in saved:
            op.overload = op.reference
        yield
    finally:
        for op, overload in saved:
            op.overload = overload


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and logs of the exporters."""
    logger = logging.getLogger('torch')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _check_onnx(path: Path, written: Path, generator: ExportedGenerator) -> float | None:
    runtime = optional('onnxruntime')
    if runtime is None:
        return None
    session = runtime.InferenceSession(str(written), providers=['CPUExecutionProvider'])

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        fed = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(['img'], fed)[0])
    return _checked(path, generator, run)


@torch.no_grad()
def _checked(path: Path, generator: ExportedGenerator, run: Any) -> float:
    """The largest difference between run(inputs) and the network. Raises UserError if it is too large."""
    differences = []
    for batch in BATCH_SIZES:
        inputs = generator.examples(batch)
        differences.append((run(inputs) - generator(*inputs.values())).abs().max())
    # Python's max() and `>` would both miss NaN.
    difference = float(torch.stack(differences).max())
    if not difference <= MAX_DIFFERENCE:
        raise UserError(f'{path}: not written: its images differ by {difference:.3g} from those of the '
                        'network')
    return difference
