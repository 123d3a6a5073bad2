# SPDX-License-Identifier: Apache-2.0
"""Images from a trained generator: seeds, styles, interpolations, videos."""
