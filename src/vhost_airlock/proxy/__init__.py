# SPDX-License-Identifier: Apache-2.0
"""One front, its back, and all between: the control plane of an airlock."""
