# SPDX-License-Identifier: Apache-2.0
"""Networks and losses that can be trained, by name."""
