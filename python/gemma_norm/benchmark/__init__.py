"""``python -m gemma_norm.benchmark``: this package's operators beside copy_, PyTorch and other libraries.

A *suite* is a list of *points* (operator, shape, dtype, cache state). At each point every *provider* that can do it is
checked against the float64 oracle, then timed in turn with the others. ``--help`` says how to choose; the modules, in
reading order: arguments, cases (a point and its tensors), suites, providers, check, timing, run, results, report, plot.
"""
