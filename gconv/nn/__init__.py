"""Layers: convolutions, separable convolutions, batch norm and pooling on groups."""
