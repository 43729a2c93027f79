"""gemma_norm inside other libraries. Nothing here is imported by ``import gemma_norm``."""
