# SPDX-License-Identifier: Apache-2.0
"""Whether a training fits into memory, and how long it takes."""
