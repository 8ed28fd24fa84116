"""Readers of data sets, one format each: functions that return `Records`."""
