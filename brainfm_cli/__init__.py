"""brainfm: brain foundation models on BIDS datasets. See README.md for the house and its rooms."""
