# SPDX-License-Identifier: Apache-2.0
"""Datasets: reading, converting and checking them."""
