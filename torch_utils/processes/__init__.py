# SPDX-License-Identifier: Apache-2.0
"""Several processes: rendezvous, detection of hung processes, comparison of their states."""
