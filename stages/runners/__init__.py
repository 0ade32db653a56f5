"""Runners perform many tasks: here by processes of this machine. They know tasks, not scenes."""
