"""The page of `adcam show` in a real browser: slider, classes, views, keys; with no error and no request.

Skipped where there is no Chromium or playwright."""
import importlib.util

import numpy as np
import pytest
from test_browser import CHROMIUM, chromium_page
from test_show import content, made_seed

from adcam import show
from adcam.evaluation import seed_mask
from adcam.scenes import Scenes
from adcam.seeds import save_seed

pytestmark = pytest.mark.skipif(not CHROMIUM or importlib.util.find_spec("playwright") is None, reason="needs Chromium and playwright")
SLOW = """const decode = HTMLImageElement.prototype.decode;
HTMLImageElement.prototype.decode = async function () { await new Promise(done => setTimeout(done, 100)); return decode.call(this); };"""   # a busy machine
FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
DRAWN = "n => { const g = document.querySelectorAll('main canvas')[n], d = g.getContext('2d').getImageData(0, 0, g.width, g.height).data; return [g.width, g.height, ...d]; }"


def pixels(page, n):
    "What a card shows: (H,W,3)"
    w, h, *rest = page.evaluate(DRAWN, n)
    return np.array(rest, np.uint8).reshape(h, w, 4)[..., :3]


def changed(page, n, before):
    "The card, when it shows something else"
    page.wait_for_function(f"([n, old]) => {{ const a = ({DRAWN})(n); let s = 0; for (let i = 2; i < a.length; i++) s = (31 * s + a[i]) | 0; return s !== old; }}",
                           arg=[n, checksum(before)], timeout=15000)
    page.evaluate(FRAMES)                                                     # a later key may still wait for its frame
    return pixels(page, n)


def checksum(a):
    "The same sum as in the page"
    s = 0
    for v in np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]).ravel().tolist(): s = (31*s + v) & 0xFFFFFFFF
    return s - 2**32 if s >= 2**31 else s


@pytest.fixture(scope="module")
def ds():
    return Scenes("val", 6, size=96)


@pytest.fixture(scope="module")
def file(ds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for i in range(len(ds)): save_seed(folder/f"seeds/{ds.ids[i]}.npz", made_seed(ds, i))
    path, = show.write_show(folder/"page.html", show.gallery(ds, folder/"seeds", ".npz"), .3)
    return path


def test_slider_class_and_views_change_the_pictures(file, ds):
    asked, faults, told = [], [], content(file.read_text())
    with chromium_page() as page:
        page.on("request", lambda r: None if r.url.startswith("data:") or r.url == file.as_uri() else asked.append(r.url))
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.add_init_script(SLOW)
        page.goto(file.as_uri())
        page.wait_for_function("() => document.querySelector('figcaption .soft').textContent.includes('IoU')")  # written after the first drawing
        start = pixels(page, 0)

        s, image = show.read_shown(ds, 0, file.parent/"seeds", ".npz"), None
        page.locator("#views label", has_text="photograph").click()
        image = changed(page, 0, start)
        painted = (np.abs(start.astype(int) - image).max(-1) > 3)             # what the mask view had painted
        mine = seed_mask(s.maps, np.array(s.keys) - 1, .3) > 0
        assert (painted & mine).sum()/(painted | mine).sum() > .9             # the browser cuts where `seed_mask` cuts

        page.locator("#views label", has_text="mask").click()
        changed(page, 0, image)
        page.locator("#t").focus()
        for _ in range(30): page.keyboard.press("ArrowRight")                 # 0.30 -> 0.60
        higher = changed(page, 0, start)
        assert page.locator("#tv").inner_text() == "0.60"
        assert (np.abs(higher.astype(int) - image).max(-1) > 3).sum() < painted.sum()
        page.wait_for_function("text => document.querySelector('#numbers').textContent.includes(text)", arg=f"mIoU {100*told['scores']['miou'][60]:.1f}")

        page.locator("#views label", has_text="errors").click()
        wrong = changed(page, 0, higher)
        page.locator("#views label", has_text="heat map").click()
        heat = changed(page, 0, wrong)

        c = next(c for c in told["items"][0]["labels"] if sum(c in x["labels"] for x in told["items"]) < len(told["items"]))
        page.locator("#classes label", has_text=told["classes"][c]).click()   # a class: cards without it go
        if len(told["items"][0]["keys"]) > 1: changed(page, 0, heat)
        page.wait_for_function("n => [...document.querySelectorAll('main figure')].filter(f => f.checkVisibility()).length === n",
                               arg=sum(c in x["labels"] for x in told["items"]))
        page.wait_for_function("n => document.querySelector('#numbers').textContent.startsWith(`${n} photograph${n === 1 ? '' : 's'} `)",
                               arg=page.locator("main figure:visible").count())
        page.locator("#classes label", has_text="all 6").click()

        page.locator("main figure button").first.focus()
        page.keyboard.press("Enter")                                          # all views of one, then the next, then back
        page.wait_for_selector("dialog[open] canvas")
        assert page.locator("dialog canvas").count() == 4
        page.keyboard.press("ArrowRight")
        page.wait_for_function("name => document.querySelector('dialog h2').textContent.includes(name)", arg=told["items"][1]["id"])
        page.keyboard.press("Escape")
        page.wait_for_selector("dialog[open]", state="detached")
    assert not asked, f"asked for {asked}"
    assert not faults, faults


def test_phone_and_dark(file):
    from playwright.sync_api import sync_playwright
    from test_browser import FLAGS
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            page = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme="dark", has_touch=True, is_mobile=True).new_page()
            page.goto(file.as_uri())
            page.wait_for_selector("main canvas")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the phone"
            ground, text = (page.evaluate(f"getComputedStyle(document.body).{n}") for n in ("backgroundColor", "color"))
            dark, light = (sum(map(int, v[4:-1].split(","))) for v in (ground, text))
            assert dark < 200 < 600 < light
            assert page.locator("header").bounding_box()["height"] < 350
        finally: browser.close()
