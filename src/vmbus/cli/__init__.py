"""The `vmbus` command."""
