# SPDX-License-Identifier: Apache-2.0
"""Metrics of the quality of generated images."""
