"""Thin assemblies: choose parts, wire losses. Systems never import one another."""
