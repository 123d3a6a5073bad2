# SPDX-License-Identifier: Apache-2.0
"""Operators that PyTorch lacks, or has without gradients of arbitrary order."""
