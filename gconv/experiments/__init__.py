"""``python -m gconv.experiments``: many training runs, one record each, and their tables."""
