"""Figures, and tables on the console."""
