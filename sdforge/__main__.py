"""`python -m sdforge` is `forge`."""

from sdforge.cli import main

raise SystemExit(main())
