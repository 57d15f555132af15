"""The vhost-user protocol as a library: both roles, and what they are made of."""
