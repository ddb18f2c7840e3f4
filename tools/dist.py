"""A wheel for a package index: `python tools/dist.py [FOLDER]`, dist if not given.

README.md links to files beside it, which an index does not have. In the wheel its links are absolute: to `git_url` of settings.ini."""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from readme import address  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
INTO = ("adcam", "nbs/paper", "configs", "pyproject.toml", "README.md", "LICENSE")


def absolute(text: str, url: str, branch: str) -> str:
    "Markdown whose links do not need the files beside it; pictures lead to the file itself."
    lead = lambda kind, path: f"{url}/{kind}/{branch}/{path}"  # noqa: E731
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)", lambda m: m[1] + lead("raw", m[2]), text)
    text = re.sub(r"(?<!!)(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\()(?![a-z]+:|#)([^)\s]+)", lambda m: m[1] + lead("blob", m[2]), text)
    return re.sub(r'(src=")(?![a-z]+:)([^"]+)', lambda m: m[1] + lead("raw", m[2]), text)


def main() -> int:
    out, (url, branch) = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve(), address()
    if ".invalid" in url:
        print(f"note: git_url in settings.ini is {url}, a placeholder: links of the description lead nowhere until it is set", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="adcam-dist-") as folder:
        for name in INTO:
            source, target = ROOT / name, Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
            else:
                shutil.copy(source, target)
        readme = Path(folder) / "README.md"
        readme.write_text(absolute(readme.read_text(encoding="utf-8"), url, branch), encoding="utf-8")
        return subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), folder]).returncode


if __name__ == "__main__":
    sys.exit(main())
