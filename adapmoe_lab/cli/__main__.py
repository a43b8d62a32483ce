"""`python -m adapmoe_lab.cli`."""

import sys

from adapmoe_lab.cli.program import main

sys.exit(main())
