# SPDX-License-Identifier: Apache-2.0
"""The operators that PyTorch does not have, or not with gradients of every order."""
