"""Estimators: arrays in, numbers with errors out. They never see a model, so enumeration can test them exactly."""
