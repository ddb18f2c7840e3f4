"""README.md from nbs/index.ipynb, from its stored outputs alone: the same notebook always gives the same file.

    python tools/readme.py           write README.md, and the address of the repository where it is needed
    python tools/readme.py --check   exit 1 if they are not what the notebook and settings.ini say

The address stands in settings.ini (git_url), and nowhere else by hand: the badges of README.md and the first cell of nbs/colab.ipynb
are made from it here, links in the wheel by tools/dist.py. While it is the placeholder, there are no badges.
"""
import configparser
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PROOF = re.compile(r"\n*<!-- (?:quotes|given) .*?-->", re.S)  # of the notebook's numbers, see quotes.py
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.M)
COLAB = ROOT / "nbs/colab.ipynb"


def address() -> tuple[str, str]:
    "Address and branch of the repository, from settings.ini."
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]["git_url"].rstrip("/").removesuffix(".git"), ini["DEFAULT"]["branch"]


def badges(url: str, branch: str) -> str:
    "Badges that open the notebooks where nothing has to be installed; none for an address that Binder and Colab do not know."
    name = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", url)
    if not name: return ""
    binder = f"https://mybinder.org/v2/gh/{name[1]}/{branch}?urlpath=lab/tree/nbs/index.ipynb"
    colab = f"https://colab.research.google.com/github/{name[1]}/blob/{branch}/nbs/colab.ipynb"
    return f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder}) [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"


def colab(url: str) -> str:
    "The notebook for Colab with the address in its first cell. `ValueError` if that cell has changed its form."
    text, n = re.subn(r'(ADCAM_REPOSITORY\\", \\")[^"\\]*', lambda m: m[1] + url, COLAB.read_text(encoding="utf-8"))
    if n != 1: raise ValueError(f"{COLAB.name}: the address stands in {n} places, expected is one")
    return text


def output_text(output) -> str:
    "One stored output as markdown; pictures belong into results/ and are linked, not embedded."
    data = output.get("data", {})
    if "text/markdown" in data:
        return data["text/markdown"].strip()
    text = output["text"] if output.output_type == "stream" else data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def cell_text(cell) -> str:
    "A cell as markdown: `#| hide` drops it, `#| echo: false` keeps only what it printed."
    if cell.cell_type == "raw":
        return ""
    if cell.cell_type == "markdown":
        return PROOF.sub("", cell.source).strip()
    directives = DIRECTIVE.findall(cell.source)
    if any(d.split()[0] in ("hide", "exporti") for d in directives):
        return ""
    source = DIRECTIVE.sub("", cell.source).strip()
    shown = [] if "echo: false" in directives or not source else [f"```python\n{source}\n```"]
    return "\n\n".join(shown + [t for t in map(output_text, cell.get("outputs", [])) if t])


def readme(notebook: Path = ROOT / "nbs/index.ipynb") -> str:
    "The whole README; links that leave nbs/ lose their `../`."
    nb = nbformat.read(notebook, as_version=4)
    parts = [t for t in map(cell_text, nb.cells) if t]
    title, _, rest = parts[0].partition("\n> ")
    promise, _, rest = rest.partition("\n\n")
    parts[0] = "\n\n".join(t for t in (f"{title}\n> {promise}", badges(*address()), rest) if t)
    for i in range(len(parts) - 1, 0, -1):  # code cells in a row are one block
        if all(p.startswith("```python\n") for p in parts[i - 1:i + 1]) and parts[i - 1].count("```") == 2:
            parts[i - 1:i + 1] = [parts[i - 1].removesuffix("```") + "\n" + parts[i].removeprefix("```python\n")]
    text = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n" + "\n\n".join(parts) + "\n"
    text = re.sub(r"\]\(\.\./", "](", text)
    text = re.sub(r"\]\((?=(?:paper\b|course\b|\w+\.ipynb))", "](nbs/", text)
    return re.sub(r'src="\.\./', 'src="', text)


def main() -> int:
    made = {ROOT / "README.md": readme(), COLAB: colab(address()[0])}
    old = [p for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for p in old: print(f"{p.name} differs from nbs/index.ipynb or git_url of settings.ini: run `make readme` and commit", file=sys.stderr)
        return bool(old)
    for p in old: p.write_text(made[p], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
