"""Taggers: a backbone with a linear classifier, its classes, calibration and thresholds, in one file."""
