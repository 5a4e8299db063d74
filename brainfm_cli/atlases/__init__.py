"""The only place where an atlas is named: one JSON each."""
