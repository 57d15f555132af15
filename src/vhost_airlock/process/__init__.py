# SPDX-License-Identifier: Apache-2.0
"""The process: its sockets, signals and sessions, and its connections to back-ends."""
