"""A trained detector: calibration, decisions, prediction, export."""
