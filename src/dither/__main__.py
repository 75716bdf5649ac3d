"""`python -m dither`: the same as the console script."""

from dither.cli.main import main

raise SystemExit(main())
