"""`python -m adapmoe_lab.cli`."""

import sys

from adapmoe_lab.cli.commands import main

sys.exit(main())
