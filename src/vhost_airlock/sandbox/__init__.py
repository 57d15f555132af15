# SPDX-License-Identifier: Apache-2.0
"""How the process locks itself in."""
