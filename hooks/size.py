"""Refuses files that are too large for a repository of text: `python hooks/size.py FILE...`."""

import sys
from pathlib import Path

CAP = 1_000  # KB; the largest report has 750

large = [f"{name} has {size / 1000:,.0f} KB, more than {CAP:,}"
         for name in sys.argv[1:] if Path(name).is_file() and (size := Path(name).stat().st_size) > 1000 * CAP]
sys.exit("\n".join(large) or 0)
