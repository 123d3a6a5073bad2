# SPDX-License-Identifier: Apache-2.0
"""Profiles of a training step: kernels, layers and times."""
