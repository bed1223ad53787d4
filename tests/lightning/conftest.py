"""Puts this folder's module on the path (importlib mode does not), and Lightning into the process ranks are forked from."""

import sys
from pathlib import Path

from helpers import ranks

sys.path.insert(0, str(Path(__file__).parent))
ranks.PRELOADED.append("lightning.pytorch")
