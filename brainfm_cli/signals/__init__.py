"""Voxels to numbers. No torch."""
