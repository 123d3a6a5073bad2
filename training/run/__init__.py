# SPDX-License-Identifier: Apache-2.0
"""The run directory: files, log, snapshots, resuming."""
