"""Adapters for other projects. ``import gemma_norm`` imports none of them.

Those for SGLang, vLLM and kernels, and ``compatibility``, need these projects; ``transformers`` takes any model.
"""
