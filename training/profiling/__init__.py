# SPDX-License-Identifier: Apache-2.0
"""Profiles of a training step: kernels, layers and times."""
MICRO = 'micro'  # the name of --cfg for a small StyleGAN2 for 16x16 images
CHANNELS = 3  # of random images
