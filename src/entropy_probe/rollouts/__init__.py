"""Batches of prompts and sampled responses, and the Parquet files they live in."""
