"""Calibration: from recordings of a model's values to static schedules and tables."""
