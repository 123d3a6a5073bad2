# SPDX-License-Identifier: Apache-2.0
"""The project as one package: `stylegan2_ada.load_network(path)`, the modules `stylegan2_ada.training...`.

After `import stylegan2_ada`, pickle.load opens snapshots, too.
"""
from typing import TYPE_CHECKING, Any

from dnnlib import naming

if TYPE_CHECKING:
    from training.formats.load import load_network

__version__ = '0.1.0'
__all__ = ['__version__', 'load_network']

naming.install()


def __getattr__(name: str) -> Any:
    # Only now, since every command imports this package first and `--help` should not load torch.
    if name == 'load_network':
        from training.formats.load import load_network
        return load_network
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
