"""Data set readers, one per format: functions that return `Records`."""
