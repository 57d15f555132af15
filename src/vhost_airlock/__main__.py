# SPDX-License-Identifier: Apache-2.0
"""python -m vhost_airlock"""

import sys

from .cli.main import main

sys.exit(main())
