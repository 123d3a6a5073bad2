# SPDX-License-Identifier: Apache-2.0
"""Finding the latents of given images."""
