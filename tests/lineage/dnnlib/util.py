# SPDX-License-Identifier: Apache-2.0
"""Utilities."""


class EasyDict(dict):
    """A dictionary with items as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__
