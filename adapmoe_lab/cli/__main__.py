"""`python -m adapmoe_lab.cli`."""

import sys

from adapmoe_lab.cli.main import main

sys.exit(main())
