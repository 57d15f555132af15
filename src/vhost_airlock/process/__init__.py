# SPDX-License-Identifier: Apache-2.0
"""What belongs to a process: sockets, signals, its sessions, how it gets a back-end."""
