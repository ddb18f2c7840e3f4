"""Run figure notebooks with the small defaults of their parameters cell, away from nbs/, and say how long each took.

    python tools/smoke.py nbs/paper/fig4.ipynb ...
"""
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def smoke(notebook: Path, out: Path) -> tuple[Path, float, str]:
    "Execute one notebook; the third value is the error in words, empty if there was none."
    import papermill

    start = time.perf_counter()
    try:
        papermill.execute_notebook(str(notebook), str(out / notebook.name), kernel_name="python3",
                                   progress_bar=False, start_timeout=180, execution_timeout=600)
        error = ""
    except Exception as e:  # reported for every notebook, so that one failure does not hide the next
        error = f"{type(e).__name__}: {e}"
    return notebook, time.perf_counter() - start, error


def main(names: list[str]) -> int:
    "Two at a time at most: every notebook has a kernel of its own."
    failed = 0
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for notebook, seconds, error in pool.map(lambda n: smoke(Path(n), Path(out)), names):
            print(f"{'FAILED' if error else 'ok':6} {seconds:6.1f} s  {notebook}", flush=True)
            if error:
                failed += 1
                print(error, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
