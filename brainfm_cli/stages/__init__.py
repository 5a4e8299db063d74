"""One module per command: its settings class and one function. Stages never import one another."""
