# SPDX-License-Identifier: Apache-2.0
"""Parts that tests share: the peers of the airlock, faked or real, their memory."""
