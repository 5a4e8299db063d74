"""How any module is trained and judged, knowing none by name. No imaging library."""
