"""`python -m app.cli`: the command line without the installed script, as torchrun needs it."""

from app.cli import main

main()
