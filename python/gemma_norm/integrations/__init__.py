"""Adapters for other projects; each is imported by its own name and needs that project installed."""
