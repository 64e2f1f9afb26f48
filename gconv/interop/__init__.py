"""Networks that others made: readers of their files, and recognition of their group structure."""
