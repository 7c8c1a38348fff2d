"""Artifacts that no weights can hold: what draws with them, for our own networks and for pipelines of diffusers."""
