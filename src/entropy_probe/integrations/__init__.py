"""Adapters from a live trainer to this package; each module needs its trainer's library installed."""
