"""Detect anomaly classes that nobody has labelled yet, by multidirectional meta-learning."""
