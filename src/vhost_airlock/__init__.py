# SPDX-License-Identifier: Apache-2.0
"""A vhost-user proxy that keeps guest memory away from device back-ends."""

__version__ = "0.1.0"
