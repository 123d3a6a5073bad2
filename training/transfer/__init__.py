# SPDX-License-Identifier: Apache-2.0
"""Starting a training from the weights of other networks."""
