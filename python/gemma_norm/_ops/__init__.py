"""One file an operator: its description, the function that users call, and its derivative."""
