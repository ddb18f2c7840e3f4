"""Say where the files of a figure lie: `python tools/show.py results/mini fig4`."""
import sys
from pathlib import Path

folder, name = Path(sys.argv[1]), sys.argv[2]
files = sorted(p for p in folder.glob(f"{name}*") if p.suffix != ".ipynb" and not p.name.endswith(".tmp"))
print(f"\n{name}:")
for path in files:
    print(f"  {path}")
print(f"  {folder / name}.ipynb  (the executed notebook)")
