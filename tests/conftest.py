"What the tests share: the root of the checkout, a copy of it to work in, and a browser where there is one."

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(name, "1")


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout under test."
    return ROOT


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    "A copy of what a user works with, so that tests leave the checkout as it is."
    there = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "pipelines", "hybrid_nb"):
        shutil.copytree(ROOT / name, there / name, ignore=skip)
    for name in ("settings.ini", "constraints.txt"):
        shutil.copy(ROOT / name, there / name)
    (there / "reports").mkdir()
    return there


@pytest.fixture(scope="session")
def browser():
    "Headless Chromium of the system, driven by playwright; where there is none, the test is skipped."
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on this machine: the browser tests are skipped (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()
