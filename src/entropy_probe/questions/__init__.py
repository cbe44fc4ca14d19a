"""Questions about a prediction, one module each; see :mod:`entropy_probe.questions.base`."""
