"""Makes `train_harness` importable, the tiny run that tests of the trainer use."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
