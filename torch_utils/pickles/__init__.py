# SPDX-License-Identifier: Apache-2.0
"""Reading pickles and PyTorch files without running their code."""
