# SPDX-License-Identifier: Apache-2.0
"""Multiply and add."""


def fma(a, b, c):
    """a * b + c."""
    return a * b + c
