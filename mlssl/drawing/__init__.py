"""Figures on matplotlib, which is imported where one is drawn."""
