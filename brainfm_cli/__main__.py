"""``python -m brainfm_cli``."""

from brainfm_cli.cli import main

main()
