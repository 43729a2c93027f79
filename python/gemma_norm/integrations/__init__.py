"""Adapters for other projects. ``import gemma_norm`` imports none of them; each needs the project that it adapts to."""
