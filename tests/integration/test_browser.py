"""The pages that `trackopt ui` serves, opened in a real browser after a small training."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.helpers.processes import run_script
from trackopt import journal
from trackopt.rundir.identity import read_identity

SCRIPT = """
import torch, trackopt
from tests.helpers.training import make_training, train_step
model, optimizer, scheduler = make_training(torch.optim.SGD, momentum=0.9)
with trackopt.wrap(optimizer, scheduler, model=model, dir="runs/small") as run:
    while run.global_step < 20:
        run.step(loss=train_step(model, optimizer, scheduler))
"""
SECONDS = 60  # for a page to show what it is to show
SIZE = {"width": 1400, "height": 3000}  # what is out of sight is not drawn


def chromium():
    """A browser that starts; Ubuntu's packages of that name only say that there is a snap."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    return None


BROWSER = chromium()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A finished run, and the addresses at which it is shown."""
    home = tmp_path_factory.mktemp("home")
    script = home / "train.py"
    script.write_text(SCRIPT)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "TRACKOPT_DIR": str(home / "runs" / "small")}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{home}/mlflow.db"
    done = run_script(script, **environment)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "trackopt", "ui", str(home / "runs"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield home / "runs" / "small", orjson.loads(process.stdout.readline())
    process.terminate()
    process.communicate(timeout=60)


@pytest.fixture
def directory(served):
    return served[0]


@pytest.fixture
def tensorboard(served):
    return served[1]["tensorboard"]


@pytest.fixture
def mlflow(served):
    """The address of the run's own pages."""
    return f"{served[1]['mlflow']}/#/experiments/0/runs/{read_identity(served[0]).mlflow.run_id}"


@pytest.fixture(scope="module")
def browser():
    root = ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=root)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request):
    """A fresh page; what it showed at last is kept where ``TRACKOPT_SHOTS`` says."""
    page = browser.new_page(viewport=SIZE)
    expect.set_options(timeout=1000 * SECONDS)
    page.set_default_timeout(1000 * SECONDS)
    yield page
    if folder := os.environ.get("TRACKOPT_SHOTS"):
        page.screenshot(path=f"{folder}/{request.node.name}.png")
    page.close()


def losses(directory):
    return [value for _, value in journal.series(directory)["loss"]]


def test_tensorboard_has_a_chart_for_each_series(tensorboard, page):
    page.goto(f"{tensorboard}/#timeseries")
    page.get_by_role("combobox", name="Filter tags").fill("^(loss|lr|momentum_buffer)")
    for tag in ("loss", "lr/group0", *(f"momentum_buffer/group0.{what}" for what in ("norm", "mean", "std"))):
        card = page.locator("scalar-card").filter(has=page.get_by_title(tag, exact=True)).first
        expect(card.locator("line-chart")).to_be_visible()
        expect(card.locator("tb-data-table")).to_contain_text(re.compile("small.* 20 "))  # the last step


def test_tensorboard_draws_the_buffers_in_their_margins(tensorboard, page):
    """The custom scalars: two charts with lines, and one for each buffer, with an area around the mean."""
    page.goto(f"{tensorboard}/#custom_scalars")
    lines = page.locator("tf-custom-scalar-multi-line-chart-card")
    expect(lines).to_have_count(2)
    for chart, title in zip(lines.all(), ("loss", "learning rate"), strict=True):
        expect(chart.locator("tf-card-heading")).to_contain_text(title)
        expect(chart.locator("path.line").first).to_have_attribute("d", re.compile("M.*L"))
    margin = page.locator("tf-custom-scalar-margin-chart-card")
    expect(margin).to_have_count(1)
    expect(margin.locator("tf-card-heading")).to_contain_text("momentum_buffer/group0: mean ± std")
    expect(margin.locator("path.area")).to_have_attribute("d", re.compile("M.*L"))


def test_tensorboard_has_the_run_in_its_table(directory, tensorboard, page):
    page.goto(f"{tensorboard}/#hparams")
    table = page.locator("tf-hparams-table-view")
    for text in ("Result/best loss", "Result/final loss", f"{min(losses(directory)):.5g}"[:6], "small "):
        expect(table.get_by_text(text).first).to_be_visible()
    for text in ("optimizer", "SGD", "group0.momentum", "scheduler.step_size"):
        expect(page.locator("tf-hparams-query-pane").get_by_text(text, exact=True).first).to_be_visible()


def test_mlflow_tells_how_to_resume_and_to_reproduce(directory, mlflow, page):
    page.goto(mlflow)
    page.get_by_text("Show more").click()
    for text in ("Resume it from its newest checkpoint", "Reproduce it from the start", f"trackopt plot {directory}"):
        expect(page.get_by_text(text)).to_be_visible()
    for text in ("momentum_buffer/group0.norm", "group0.momentum"):  # a metric, a parameter
        expect(page.get_by_text(text, exact=True)).to_be_visible()


def test_mlflow_has_a_chart_for_each_series(mlflow, page):
    """The model metrics: a section for each kind of series, and in it the charts, with lines."""
    page.goto(f"{mlflow}/model-metrics")
    for series in ("loss", "lr/group0", "momentum_buffer/group0.mean", "momentum_buffer/group0.std"):
        expect(page.get_by_text(f"small ({series})", exact=True)).to_be_visible()
    expect(page.locator("path.js-line").first).to_have_attribute("d", re.compile("M.*L"))
