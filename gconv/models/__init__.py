"""The published networks, and what is done with a whole network: save, load, count, check."""
