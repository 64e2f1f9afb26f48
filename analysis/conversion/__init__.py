"""Converting a network: the request, the plan, the build and the report."""
