"""Networks for inference: batch norm folded, layers lowered to ordinary ones."""
