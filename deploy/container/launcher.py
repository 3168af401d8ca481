#!/usr/bin/python3 -IS
"""Starts jouletrace from /usr/lib/jouletrace, out of the way of the environment's Python settings."""

import sys

sys.path.insert(0, "/usr/lib/jouletrace")
from jouletrace.cli import main

sys.exit(main())
