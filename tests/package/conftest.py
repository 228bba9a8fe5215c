"""Makes the helper beside these tests importable by its bare name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
