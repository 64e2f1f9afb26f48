"""Fitting separable filters to a layer's data, and what follows: batch norm, fine-tuning."""
