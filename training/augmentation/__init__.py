# SPDX-License-Identifier: Apache-2.0
"""Adaptive augmentation: its controller, the matrices, draws and resampling behind training.augment."""
