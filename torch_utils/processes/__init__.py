# SPDX-License-Identifier: Apache-2.0
"""Several processes: how they meet, watch each other and compare their states."""
