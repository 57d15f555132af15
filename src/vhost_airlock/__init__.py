"""A vhost-user proxy that keeps guest memory away from device back-ends."""
