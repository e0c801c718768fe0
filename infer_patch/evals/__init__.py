"""Evaluations that run a model unpatched and patched on the same inputs."""
