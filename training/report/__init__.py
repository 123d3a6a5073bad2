# SPDX-License-Identifier: Apache-2.0
"""What a run shows: status lines, curves, sample sheets, the progress page."""
