"""README.md from nbs/index.ipynb, from its stored outputs alone: the same notebook always gives the same file.

    python tools/readme.py           write README.md
    python tools/readme.py --check   exit 1 if README.md is not what the notebook says
"""
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PROOF = re.compile(r"\n*<!-- (?:quotes|given) .*?-->", re.S)  # of the notebook's numbers, see quotes.py
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.M)


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
    for i in range(len(parts) - 1, 0, -1):  # code cells in a row are one block
        if all(p.startswith("```python\n") for p in parts[i - 1:i + 1]) and parts[i - 1].count("```") == 2:
            parts[i - 1:i + 1] = [parts[i - 1].removesuffix("```") + "\n" + parts[i].removeprefix("```python\n")]
    text = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n" + "\n\n".join(parts) + "\n"
    text = re.sub(r"\]\(\.\./", "](", text)
    text = re.sub(r"\]\((?=(?:paper\b|course\b|\w+\.ipynb))", "](nbs/", text)
    return re.sub(r'src="\.\./', 'src="', text)


def main() -> int:
    target = ROOT / "README.md"
    if "--check" not in sys.argv[1:]:
        target.write_text(readme(), encoding="utf-8")
        return 0
    if target.exists() and target.read_text(encoding="utf-8") == readme():
        return 0
    print("README.md differs from nbs/index.ipynb: run `make readme` and commit both", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
