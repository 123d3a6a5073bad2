# SPDX-License-Identifier: Apache-2.0
"""From kernel source to machine code on a device."""
