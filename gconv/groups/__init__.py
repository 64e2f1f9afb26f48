"""The symmetry groups of the pixel grid, and their irreducible representations."""
