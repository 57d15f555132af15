# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the peers of the airlock, faked or real, and their memory."""
