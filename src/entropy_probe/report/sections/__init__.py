"""A record as sections, to be shown anywhere."""
