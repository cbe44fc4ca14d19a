"""The questions that a probe answers, each from rollouts to a result."""
