# SPDX-License-Identifier: Apache-2.0
"""Quality of generated images, in numbers."""
