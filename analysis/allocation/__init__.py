"""Which form and rank each layer gets under a budget."""
