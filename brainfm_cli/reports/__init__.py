"""HTML pages and methods paragraphs, made from computed records; nothing is computed here."""
