"""Gradients of surrogates: totals, and what each sample adds."""
