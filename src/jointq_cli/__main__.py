"""`python -m jointq_cli` is `jointq`."""

import sys

from jointq_cli.cli.main import main

sys.exit(main())
