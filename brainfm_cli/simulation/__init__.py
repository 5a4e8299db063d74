"""Datasets with known truth. No torch."""
