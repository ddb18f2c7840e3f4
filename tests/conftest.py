"""Where the tests find their data. No path of any machine stands here: folders come from the environment or the project."""
import importlib.util
import os
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent


def load_script(path: Path):
    "A Python file outside the package as a module"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    "The project folder, where settings.ini lies."
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    "Numbers of the reference implementations: ADCAM_GOLDEN, or tests/golden."
    folder = Path(os.environ.get("ADCAM_GOLDEN") or ROOT / "tests/golden").resolve()
    assert (folder / "README.md").exists(), f"ADCAM_GOLDEN names {folder}, which holds no golden README.md"
    return folder


@pytest.fixture(scope="session")
def golden_rules(golden):
    "The generators of every golden input: `golden_rules('rules_conformer')`, `golden_rules('irn/rules')`."
    return lambda name: load_script(golden / f"{name}.py")


@pytest.fixture(scope="session")
def voc_measure():
    "tools/voc_measure.py as a module"
    return load_script(ROOT / "tools/voc_measure.py")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    "Real photographs with masks: ADCAM_COCO_MINI, or ../shared/data/coco_mini; skipped where there are none."
    folder = Path(os.environ.get("ADCAM_COCO_MINI") or ROOT.parent / "shared/data/coco_mini")
    if not folder.is_dir():
        pytest.skip("no coco_mini folder: set ADCAM_COCO_MINI to run this test")
    return folder
