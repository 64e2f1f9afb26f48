"""How long networks and layers take."""
