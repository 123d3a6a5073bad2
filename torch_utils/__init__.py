# SPDX-License-Identifier: Apache-2.0
"""What networks and training stand on: custom ops, persistence, statistics, distributed primitives."""
