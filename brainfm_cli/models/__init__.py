"""Architecture only: no files, no settings, no device."""
