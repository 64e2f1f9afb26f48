"""The compiled kernels: loading the library, choosing what runs, and the operations themselves."""
