"""Run the command line as `python -m app.cli`, without the installed script: torchrun needs it."""

from app.cli import main

main()
