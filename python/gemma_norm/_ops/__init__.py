"""A file for each operator: its description, the function that users call, and its derivative."""
