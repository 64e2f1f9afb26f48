"""Conversion to several budgets, and the Pareto front of error against cost. The command is in ``__main__``."""
