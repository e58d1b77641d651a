"""The companions in a real browser: JupyterLab is started, the notebooks run, sliders move, buttons are pressed, points are lassoed.

Wants Debian's chromium and the package playwright (CONTRIBUTING.md); without them it is skipped.
`make test-browser` runs it alone. With DOMAINMIX_SCREENSHOTS=DIR pictures of the pages are kept.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from sync import ROOT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COMPANIONS = ("91_noisy_clusters", "92_domain_map", "93_rerun_stage", "94_retrieval")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PATIENCE = 240_000   # ms: a busy machine runs the first notebook's example in a minute

if not CHROMIUM:
    pytest.skip("no Chromium here: apt-get install --no-install-recommends chromium fonts-dejavu", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install 'domainmix[browser]'")

# What the page says of itself: is every code cell done, and which failed.
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = [...panel.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.getSource().trim());
    return {busy: panel.sessionContext.session?.kernel?.status, done: cells.every(c => c.executionCount !== null),
            errors: cells.flatMap(c => c.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)};
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab on copies of the companions, in a folder with nothing else; its address."
    home = tmp_path_factory.mktemp("lab")
    (home / "nbs").mkdir()
    for name in COMPANIONS:
        nb = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = []
        nb["cells"] = [c for c in nb["cells"] if not "".join(c["source"]).startswith(("#| slow", "#| hide"))]
        (home / "nbs" / f"{name}.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    settings = home / "settings" / "@jupyterlab"
    for plugin, file, value in (("apputils-extension", "notification", {"fetchNews": "false", "checkForUpdates": False}),
                                ("notebook-extension", "tracker", {"windowingMode": "none"})):
        (settings / plugin).mkdir(parents=True, exist_ok=True)
        (settings / plugin / f"{file}.jupyterlab-settings").write_text(json.dumps(value))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTER_CONFIG_DIR": str(home / "config")}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={home}", "--LabApp.expose_app_in_browser=True"]
    with open(home / "lab.txt", "w") as out, subprocess.Popen(command, cwd=home, env=env, stdout=out, stderr=out, start_new_session=True) as server:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).read()
                    break
                except OSError:
                    time.sleep(.5)
            else:
                pytest.fail("JupyterLab did not start:\n" + (home / "lab.txt").read_text()[-2000:])
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


# The still pictures below views: how many are there, and how many are seen.
STILLS = """() => {
    const all = [...window.jupyterapp.shell.currentWidget.node.querySelectorAll('.jp-OutputArea-child')]
        .filter(e => e.querySelector('.jp-RenderedImage img') && e.previousElementSibling?.matches('.jp-OutputArea-child'));
    return {there: all.length, seen: all.filter(e => e.offsetHeight > 50 && e.querySelector('img').naturalWidth > 50).length};
}"""


class Page:
    "A companion, opened and run."

    def __init__(self, browser, lab, name, run=True):
        self.name, self.console, self.outside = name, [], []
        self.page = browser.new_page(viewport={"width": 1500, "height": 1300})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda m: self.console.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.console.append(str(e)))
        self.page.on("request", lambda r: None if r.url.startswith((lab, lab.replace("http", "ws"), "data:", "blob:")) else self.outside.append(r.url))
        self.page.goto(f"{lab}/lab/tree/nbs/{name}.ipynb?reset")
        self.page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        self.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area').catch(() => 0)")
        if run:
            self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
            self.wait_done()

    def wait_done(self):
        until = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < until:
            state = self.page.evaluate(STATE)
            if state["errors"]:
                pytest.fail(f"{self.name}: {state['errors']}")
            if state["done"] and state["busy"] == "idle":
                return
            time.sleep(.3)
        self.shot("stuck")
        pytest.fail(f"{self.name} did not finish: {state}")

    def picture(self):
        "The bytes of the view's own picture."
        return self.page.locator(".domainmix-picture").last.get_attribute("src")

    def wait_new(self, old, what):
        "Wait until the picture is another one."
        until = time.monotonic() + 60
        while time.monotonic() < until:
            new = self.picture()
            if new != old:
                return new
            time.sleep(.1)
        self.shot("unchanged")
        pytest.fail(f"{self.name}: {what} changed nothing")

    def shot(self, what=""):
        folder = os.environ.get("DOMAINMIX_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{self.name}{'-' * bool(what)}{what}.png")

    def close(self, *noise):
        "Nothing went wrong unseen, but for console lines with `noise`; and nothing left the machine."
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()
        noise += ("favicon", "Failed to load resource: the server responded with a status of 404")
        assert not self.outside, f"{self.name} asked for {self.outside[:5]}"
        assert not [c for c in self.console if not any(n in c for n in noise)], "\n".join(self.console)


def control(page, label):
    "The slider, field or menu that stands beside a label."
    return page.page.locator(".widget-hbox", has=page.page.locator(f".widget-label:text-is('{label}')")).last


def move(page, label, key, times):
    "Move a slider by the keyboard, and see the picture change."
    old, handle = page.picture(), control(page, label).locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(times):
        page.page.keyboard.press(key)
    return page.wait_new(old, f"moving {label}")


def choose(page, menu, old, **option):
    "Choose from a menu, and see the picture change."
    control(page, menu).locator("select").select_option(**option)
    return page.wait_new(old, f"choosing in {menu}")


def test_noisy_clusters(browser, lab):
    page = Page(browser, lab, "91_noisy_clusters")
    numbers = page.page.locator(".widget-html table").first.inner_text()
    old = move(page, "eps, reach", "ArrowLeft", 8)
    assert page.page.locator(".widget-html table").first.inner_text() != numbers
    choose(page, "show", old, label="most mixed first")
    page.shot()
    page.close()


def test_a_stopped_kernel_leaves_pictures(browser, lab):
    page = Page(browser, lab, "91_noisy_clusters")
    command = lambda name: page.page.evaluate(f"() => window.jupyterapp.commands.execute('{name}')")
    assert page.page.evaluate(STILLS) == {"there": 1, "seen": 0}             # the widget answers, and its picture is not shown twice
    command("docmanager:save")
    command("kernelmenu:shutdown")
    page.page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.sessionContext.session")
    page.page.wait_for_timeout(1500)
    seen = page.page.evaluate(STILLS)
    widget = page.page.locator(".domainmix-picture")
    if widget.count(): widget.last.scroll_into_view_if_needed()
    assert seen["seen"] + (widget.count() and widget.last.is_visible()) == 1, seen        # one or the other, not both and not none
    assert page.page.locator(".jp-Dialog").count() == 0
    page.shot("stopped")
    page.close("widget model not found")                                     # the notebook may have been saved by the test before
    again = Page(browser, lab, "91_noisy_clusters", run=False)               # opened as it was saved: nothing is run
    again.page.locator(".jp-RenderedImage img").last.wait_for()
    again.page.wait_for_timeout(1500)
    assert again.page.evaluate(STILLS) == {"there": 1, "seen": 1}
    again.page.locator(".jp-RenderedImage img").nth(2).scroll_into_view_if_needed()
    assert again.page.locator(".jp-Dialog").count() == 0
    again.shot("opened-again")
    again.close("widget model not found")


def test_domain_map(browser, lab):
    page = Page(browser, lab, "92_domain_map")
    canvas = page.page.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    page.page.wait_for_timeout(1500)
    box, old = canvas.bounding_box(), page.picture()
    x, y, w, h = box["x"], box["y"], box["width"], box["height"]
    page.page.mouse.move(x + .15 * w, y + .15 * h)
    page.page.mouse.down()
    for u, v in ((.85, .15), (.85, .85), (.15, .85), (.15, .2)):
        page.page.mouse.move(x + u * w, y + v * h, steps=6)
        page.page.wait_for_timeout(300)
    page.page.mouse.up()
    page.wait_new(old, "a lasso")
    page.shot()
    page.close()


def test_rerun_stage(browser, lab):
    page = Page(browser, lab, "93_rerun_stage")
    field = control(page, "epochs").locator("input")
    field.fill("400")
    field.press("Enter")
    page.page.get_by_role("button", name="Run", exact=True).click()
    stop = page.page.get_by_role("button", name="Stop", exact=True)
    page.page.wait_for_function("() => [...document.querySelectorAll('.widget-html')].some(e => /running: [1-9]/.test(e.innerText))")
    page.shot("running")
    stop.click()
    page.page.get_by_text("stopped; what was finished is kept").wait_for()
    field.fill("4")
    field.press("Enter")
    lr = control(page, "lambda_m").locator("input")
    lr.fill("3")
    lr.press("Enter")
    page.page.get_by_role("button", name="Resume", exact=True).click()
    page.page.get_by_text("stage3.lambda_m").first.wait_for()
    page.shot()
    page.close()


def test_retrieval(browser, lab):
    page = Page(browser, lab, "94_retrieval")
    old = move(page, "query", "ArrowRight", 3)
    choose(page, "answers of camera", old, index=1)
    page.shot()
    page.close()
