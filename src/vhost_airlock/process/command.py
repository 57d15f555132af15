# SPDX-License-Identifier: Apache-2.0
"""The command that starts a back-end: the words that stand for its socket, and the time
that its program has to end.

`program` starts it, and is imported only where there is a command: what it needs of the
standard library would take every airlock a tenth of its start and of its memory.
"""

CONNECTED_FD = "{fd}"
"""In a command: the number of a connected socket (as passt wants it)."""
LISTENING_FD = "{listen-fd}"
"""In a command: the number of a listening socket (as virtiofsd wants it)."""

GRACE = 0.5
"""Seconds that a program has to end with its connection."""
PATIENCE = 3.0
"""Seconds that it has after SIGTERM."""
