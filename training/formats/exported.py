# SPDX-License-Identifier: Apache-2.0
"""Generators as programs for other runtimes: ONNX, and torch.export. Plain operators only, any batch size.

Both take z [N, z_dim] and, if there are classes, c [N, c_dim], all float32, and give img [N, C, H, W] in
[-1, 1], float32, not clamped. Truncation and noise are fixed when writing.
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

BATCH_SIZES = (1, 4)  # of the comparison with the network itself
MAX_DIFFERENCE = 1e-3  # of pictures, which go from -1 to 1
OPSET = 18
NEEDED = 'this needs more packages: pip install onnx onnxscript onnxruntime'


class Pictures(torch.nn.Module):
    """What is exported: latents to pictures in float32, with fixed truncation and noise ('const', 'none')."""

    def __init__(self, G: torch.nn.Module, truncation_psi: float = 1, noise_mode: str = 'const'):
        super().__init__()
        self.G, self.truncation_psi, self.noise_mode = G, truncation_psi, noise_mode

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """z [N, z_dim], c [N, c_dim] -> img [N, C, H, W]."""
        # Not fused: per-sample weights would fix the batch size in the shapes of the convolutions.
        return self.G(z, c, truncation_psi=self.truncation_psi, noise_mode=self.noise_mode, force_fp32=True,
                      fused_modconv=False)

    def examples(self, batch: int) -> dict[str, torch.Tensor]:
        """Inputs by name, always the same."""
        generator = torch.Generator().manual_seed(batch)
        inputs = {'z': torch.randn([batch, self.G.z_dim], generator=generator)}
        if self.G.c_dim:
            classes = torch.arange(batch) % self.G.c_dim
            inputs['c'] = torch.nn.functional.one_hot(classes, self.G.c_dim).to(torch.float32)
        return inputs


def write_onnx(path: str | os.PathLike, pictures: Pictures) -> float | None:
    """Write an ONNX model; returns the largest difference of its pictures, None without onnxruntime.

    Raises UserError if packages are missing, the file cannot be written, or the pictures differ too much.
    """
    for package in ('onnx', 'onnxscript'):
        if optional(package) is None:
            raise UserError(f'{path}: {NEEDED}')
    program = _program(pictures)
    inputs = pictures.examples(2)
    with _quiet():
        # The optimiser takes an addend of 1e-8 for 0, which is there against a division by it. Runtimes have
        # one of their own.
        model = torch.onnx.export(
            program, tuple(inputs.values()), dynamo=True, input_names=list(inputs), output_names=['img'],
            opset_version=OPSET, dynamic_shapes=_per_argument(inputs, 'batch'), verbose=False, optimize=False)
    with replace_file(path) as temporary:
        model.save(str(temporary), external_data=False)
        return _check_onnx(Path(path), temporary, pictures)


def write_torch_export(path: str | os.PathLike, pictures: Pictures) -> float:
    """Write a torch.export program (.pt2); returns the largest difference of its pictures.

    It opens with torch.export.load() where this project is not installed. Raises UserError as write_onnx().
    """
    with torch.no_grad(), _quiet():
        # To the functional form: no operator that changes its input.
        program = _program(pictures).run_decompositions({})
    with replace_file(path) as temporary, _quiet():
        # Into memory first: torch judges the file by its suffix, and older releases by its name.
        content = io.BytesIO()
        torch.export.save(program, content)
        content.seek(0)
        again = torch.export.load(content).module()
        temporary.write_bytes(content.getvalue())
        return _checked(Path(path), pictures, lambda inputs: again(*inputs.values()))


def optional(package: str) -> ModuleType | None:
    """The module of a package that not everybody has, None without it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


@torch.no_grad()
def _program(pictures: Pictures) -> torch.export.ExportedProgram:
    if not isinstance(pictures.G, tuple(system.generator for system in SYSTEMS.values())):
        raise UserError('only generators of this program can be exported, not a '
                        f'{type(pictures.G).__name__}')
    inputs, batch = pictures.examples(2), torch.export.Dim('batch')
    with _plain_operators(), _quiet():
        return torch.export.export(
            pictures.eval(), tuple(inputs.values()), dynamic_shapes=_per_argument(inputs, batch))


def _per_argument(inputs: dict[str, Any], batch: Any) -> dict[str, Any]:
    return {name: {0: batch} for name in inputs}


@contextlib.contextmanager
def _plain_operators() -> Iterator[None]:
    """Trace the reference code of our operators instead of calls of them, which nobody else knows."""
    modules = [module for name, module in sys.modules.items() if name.startswith('torch_utils.ops')]
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
    """Without the exporters' remarks about themselves."""
    logger = logging.getLogger('torch')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _check_onnx(path: Path, written: Path, pictures: Pictures) -> float | None:
    runtime = optional('onnxruntime')
    if runtime is None:
        return None
    session = runtime.InferenceSession(str(written), providers=['CPUExecutionProvider'])

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        fed = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(['img'], fed)[0])
    return _checked(path, pictures, run)


@torch.no_grad()
def _checked(path: Path, pictures: Pictures, run: Any) -> float:
    """The largest difference between run(inputs) and the network. Raises UserError if it is too large."""
    differences = []
    for batch in BATCH_SIZES:
        inputs = pictures.examples(batch)
        differences.append((run(inputs) - pictures(*inputs.values())).abs().max())
    # Neither Python's max() nor `>` would notice NaN.
    difference = float(torch.stack(differences).max())
    if not difference <= MAX_DIFFERENCE:
        raise UserError(f'{path}: not written: its pictures differ by {difference:.3g} from those of the '
                        'network')
    return difference
