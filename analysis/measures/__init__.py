"""How redundant filters are: spectra, irreducible representations, null models."""
