"""Readers of data sets, the records that they return, and the loaders of a run."""
