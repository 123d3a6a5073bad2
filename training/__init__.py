# SPDX-License-Identifier: Apache-2.0
"""Networks, data, losses and the training loop."""
