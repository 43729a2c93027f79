"""pytest puts this folder on sys.path, so that the tests of every folder below find what they share
(kernel_names.py, file_lock.py).
"""
