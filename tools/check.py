"""The generated files agree with the notebooks: `nbdev_export`, `nbdev_clean`, tools/contents.py and the README change nothing.

Runs in the work tree, dirty or clean. A file that was out of step has been brought into step when this ends with 1.
"""
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WATCHED = ("adcam/**/*.py", "nbs/**/*.ipynb", "README.md", "pyproject.toml", "settings.ini")


def fingerprints() -> dict[str, str]:
    "sha256 of every watched file, by its path in the project."
    files = {p for pattern in WATCHED for p in ROOT.glob(pattern) if ".ipynb_checkpoints" not in p.parts}
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def run(*command: str) -> None:
    "A tool of this very environment, whatever the PATH says."
    here = Path(sys.executable).parent
    path = os.pathsep.join([str(here), os.environ.get("PATH", "")])
    program = shutil.which(command[0], path=path) or command[0]
    subprocess.run([program, *command[1:]], cwd=ROOT, check=True, env={**os.environ, "PATH": path})


def main() -> int:
    before = fingerprints()
    run("nbdev_export")
    run("nbdev_clean")
    run(sys.executable, "tools/contents.py")
    run(sys.executable, "tools/readme.py")
    after = fingerprints()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed:
        how = "is new" if name not in before else "differed from its source"
        print(f"  {name} {how}", file=sys.stderr)
    if changed:
        print("edit notebooks, not modules, and run `make export`; now commit what `make check` has just rewritten", file=sys.stderr)
    else:
        print(f"{len(after)} files agree with their notebooks")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
