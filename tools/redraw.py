"""The committed figures once more from their committed numbers, after a change of colors or style: nothing is measured.

    python tools/redraw.py              every figure of results/mini and results/photos that is drawn from its JSON alone
    python tools/redraw.py fig4 table1  only these

The drawing cells of the figure notebooks run as they stand; what they would have measured is read from the file.
fig1, fig5 and the picture rows of fig6 show heat maps and need their networks: `make fig1 fig5 fig6`.
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import nbformat  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def fig4(r: dict) -> dict:
    return dict(table=r["summary"], everything=r["summary"], N=r["tokens"], reported=["train", "test"], counts="")


def fig6(r: dict) -> dict:
    return dict(oracle={(q["direction"], q["steps"]): q for q in r["average"]}, counts="")


def table1(r: dict) -> dict:
    resnet = [e["name"] for e in r["rows_measured"] if e["network"] not in ("conformer_mini", "patch_mini")]
    return dict(table=r["summary"], NAMES=[e["name"] for e in r["rows_measured"]], RESNET=resnet, TRUTH="ground truth", counts="",
                group=lambda row, variant, crf: f"{row}: {variant}{' + CRF' if crf else ''}")


def table2(r: dict) -> dict:
    from adcam.pipeline import PUBLISHED
    return dict(rows=r["rows"], PAPER={p["method"]: p for p in PUBLISHED["table2"]["rows"]}, SMALL="resnet_mini", LARGE="conformer_mini")


def table3(r: dict) -> dict:
    from adcam.pipeline import Point
    return dict(table=r["summary"], chosen=Point(**r["chosen"]), held="test", counts="")


def why(r: dict) -> dict:
    return dict(why=r["summary"], counts="")


def photos(r: dict) -> dict:
    from types import SimpleNamespace
    from adcam.pipeline import Point
    point = lambda q: Point(*(q[f] for f in Point._fields))
    return dict(rows=r["rows"], index={(q["split"], q["size"], q["blocks"], point(q), q["rule"]): q for q in r["rows"]}, net=SimpleNamespace(stride=14),
                points=[], BLOCKS=("all", "half"), directions=("push", "pull"), references=[Point("cam"), Point("ts_cam"), Point("trans_cam", 0, 1, "pull")],
                NAMES=dict(cam="CAM", ts_cam="TS-CAM", trans_cam="TransCAM", att_diffu="Att-Diffu only", ad_cam="AD-CAM"))


FIGURES = {  # name: notebook, cells to run (by id; a line of code stands for itself), what their names mean
    "fig4": ("fig4", ("d7964f8c", "47a145b2", "920fa52c", "ad44d50c", "c4ad7631", "1bf361d3"), fig4),
    "fig6": ("fig6", ("d911a959", "f08e2a25"), fig6),
    "table1": ("table1", ("82ae521d", "32df6204"), table1),
    "related/table1": ("table1", ("82ae521d", "32df6204"), table1),
    "table2": ("table2", ("b13f8b77", "b2619245"), table2),
    "table3": ("table3", ("1966a469", "ROWS = scenes_rows()", "bdd12ea8", "36dc995e"), table3),
    "photos": ("photos", ("228892fb", "ea32b1c2", "230f4a03", "d665392c", "a1efb2a5"), photos),
    "why": ("table3", ("b9bceaf2", "89656d77"), why),
}


def draw(name: str, folder: Path, out: Path) -> None:
    "Run the drawing cells of one figure on the file of its numbers; pictures go to `out`."
    notebook, ids, given = FIGURES[name]
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    cells = {c.id: c.source for c in nbformat.read(ROOT / f"nbs/paper/{notebook}.ipynb", as_version=4).cells}
    imports = next(s for s in cells.values() if "from adcam.viz import" in s)
    space = result["provenance"]["settings"] | dict(out=out)
    exec(imports, space)
    exec("set_style()", space)
    space |= given(result)
    for i in ids: exec(cells.get(i, i), space)
    space["plt"].close("all")
    print(f"{name} is drawn")


def main() -> int:
    names = sys.argv[1:] or list(FIGURES)
    if unknown := sorted(set(names) - set(FIGURES)):
        print(f"{', '.join(unknown)}: not drawn from numbers alone; there are {', '.join(FIGURES)}", file=sys.stderr)
        return 2
    for name in names:
        folder = ROOT / "results" / ("photos" if name == "photos" else "mini")
        draw(name, folder, (folder / name).parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
