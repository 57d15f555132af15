"""python -m vhost_airlock"""

import sys

from .cli import main

sys.exit(main())
