# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its files, its log, its snapshots, and how it is resumed."""
