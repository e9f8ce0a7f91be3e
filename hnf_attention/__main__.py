"""`python -m hnf_attention`: the command line."""

import sys

from .cli import main

sys.exit(main())
