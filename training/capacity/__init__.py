# SPDX-License-Identifier: Apache-2.0
"""Does a training fit, and how long will it take."""
