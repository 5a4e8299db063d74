"""The only room that knows file names."""
