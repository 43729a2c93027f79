"""``python -m gemma_norm.benchmark``: times this package's operators, copy_, PyTorch and other libraries.

A *suite* is a list of *points*, each an operator with a shape, a dtype and a cache state. A *provider* is what is
timed. At each point, the results of every provider that has the operator are compared with the float64 oracle; then the
providers take turns while they are timed. ``--help`` says how to choose among all these. The modules in reading order:
arguments, cases (a point and its tensors), suites, providers, check, timing, run, results, report, plot. What providers
call is in norms and norm_peers, rotation and rotation_peers, and quantised. Suites of derivatives have their tensors
and calls in gradients, and their check in check_gradients.

Two other commands measure whole models: ``gemma_norm.benchmark.model`` runs those of transformers, and
``gemma_norm.benchmark.train`` trains a small one.
"""
