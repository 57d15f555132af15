"""What the tests share: the peers of the airlock, faked or real, and their memory."""
