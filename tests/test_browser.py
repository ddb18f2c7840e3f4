"""The page nbs/inspector.ipynb in a real browser: JupyterLab in Chromium, two sliders and clicks, with no request leaving the machine.

Skipped where there is no Chromium, playwright or JupyterLab. ADCAM_SCREENSHOT names a PNG to keep what the browser showed."""
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest
from conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = [name for name in ("playwright", "jupyterlab", "ipywidgets", "ipyevents") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(NEEDED or not CHROMIUM), reason=f"needs Chromium ({CHROMIUM}) and {', '.join(NEEDED) or 'nothing else'}")

FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
# what the picture shows, as a string: the blob URL alone would also change if the same picture were sent again
PIXELS = """name => {
    const img = document.querySelector(name), canvas = document.createElement('canvas');
    if (!img || !img.complete || !img.naturalWidth) return null;
    canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;
    canvas.getContext('2d').drawImage(img, 0, 0);
    return canvas.toDataURL();
}"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    end = monotonic() + seconds
    while monotonic() < end:
        assert server.poll() is None, f"JupyterLab stopped: {log.read_text()[-2000:]}"
        try: return urllib.request.urlopen(url, timeout=2).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError): sleep(0.1)
    raise AssertionError(f"JupyterLab did not answer in {seconds} s: {log.read_text()[-2000:]}")


@contextmanager
def jupyterlab(folder: Path):
    "A JupyterLab of its own, with no configuration of the user; gives a function name -> address."
    config, port, token, log = folder / "config", free_port(), os.urandom(12).hex(), folder / "lab.log"
    (config / "labconfig").mkdir(parents=True)
    (config / "labconfig/page_config.json").write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(config), "OMP_NUM_THREADS": "1"}
    env |= {f"{name}_DIR": str(folder / name.lower()) for name in ("JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_WORKSPACES", "JUPYTERLAB_SETTINGS")}
    env["IPYTHONDIR"] = str(folder / "ipython")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    with open(log, "w") as out: server = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, log)
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()  # JupyterLab ends its kernels first
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill(); server.wait()


@contextmanager
def chromium_page():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try: yield browser.new_page(viewport={"width": 1400, "height": 900})
        finally: browser.close()


class Screen:
    "The pictures of the inspector on a page."
    def __init__(self, page): self.page = page
    def pixels(self, name): return self.page.evaluate(PIXELS, f"img.adcam-{name}")

    def changed(self, before: dict) -> dict:
        "Wait until every named picture is another one than before."
        for name, old in before.items():
            self.page.wait_for_function(f"([name, old]) => {{ const now = ({PIXELS})(name); return now && now !== old }}",
                                        arg=[f"img.adcam-{name}", old], timeout=15000)
        return {name: self.pixels(name) for name in before}


def test_sliders_and_clicks_change_the_pictures(tmp_path):
    shutil.copy(ROOT / "nbs/inspector.ipynb", tmp_path)
    outside, faults = [], []
    with jupyterlab(tmp_path) as address, chromium_page() as page:
        page.on("request", lambda r: None if r.url.startswith(("http://127.0.0.1:", "data:", "blob:")) else outside.append(r.url))
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(address("inspector.ipynb"), timeout=60000)
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60000)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_selector("img.adcam-heat, .jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']", timeout=60000)
        page.wait_for_selector("img.adcam-refined", timeout=15000)
        screen, names = Screen(page), ("heat", "A", "S", "kept", "refined")
        page.wait_for_function(f"() => ({json.dumps(names)}).every(n => ({PIXELS})('img.adcam-' + n))", timeout=15000)
        start = {name: screen.pixels(name) for name in names}
        assert len(set(start.values())) == 5

        handles = page.locator(".noUi-handle")
        assert handles.count() == 2
        readouts = page.locator(".widget-readout").all_inner_texts()
        assert readouts == ["50", "2"]                                        # the paper's k and T
        handles.nth(0).press("ArrowRight")                                    # k
        after_k = screen.changed({name: start[name] for name in ("heat", "kept", "refined")})
        assert (screen.pixels("A"), screen.pixels("S")) == (start["A"], start["S"])  # a row of A does not depend on k
        handles.nth(1).press("ArrowLeft")                                     # T
        after_T = screen.changed({"heat": after_k["heat"]})
        assert screen.pixels("kept") == after_k["kept"]
        assert all(a != b for a, b in zip(page.locator(".widget-readout").all_inner_texts(), readouts))

        text = page.locator(".widget-html-content", has_text="patch ").inner_text()
        before = after_k | after_T | {"A": start["A"], "S": start["S"]}
        page.locator("img.adcam-heat").click(position={"x": 20, "y": 20})     # a pixel of the heat map
        clicked = screen.changed(before)
        assert page.locator(".widget-html-content", has_text="patch ").inner_text() != text
        box = page.locator("img.adcam-S").bounding_box()
        page.locator("img.adcam-S").click(position={"x": box["width"] - 5, "y": box["height"] - 5})  # and one of the small pictures
        screen.changed(clicked)
        last = page.locator(".widget-html-content", has_text="patch ").inner_text()
        assert last.startswith("patch 575 (row 23, column 23)"), last         # the corner of the 24x24 grid, whatever size it is shown in
        pulled = {"heat": screen.pixels("heat")}
        page.locator(".widget-toggle-button", has_text="push").click()
        screen.changed(pulled)
        if os.environ.get("ADCAM_SCREENSHOT"): page.screenshot(path=os.environ["ADCAM_SCREENSHOT"])
    assert not outside, f"asked for {outside}"
    assert not faults, faults
