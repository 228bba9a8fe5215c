"""Makes the helpers beside the pass tests importable by their bare names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
