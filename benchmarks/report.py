"""How long ``report.html`` takes to write and to open, with 512 responses of 200 tokens, or 256 of 1,000 (``--long``).

The tables are made up, with as many distinct tokens as a real vocabulary would give. Opening is from the start of the
navigation to the first frame that shows the responses, in a fresh context of Chromium each time; the page's own clock
says so. The longest frame is while the whole page is scrolled, 400 pixels a frame. Needs Chromium (``apt-get install
chromium``).

Run ``python benchmarks/report.py``, or with ``--quick`` at a size that only shows that it works. Exits with 1 if the
median is above two seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.report.tables import result_of, write_tables  # noqa: E402

from entropy_probe.report import page, run_sections  # noqa: E402

LIMIT = 2.0
FIRST_FRAME = """() => new Promise((done) => {
  const look = () => document.querySelector('#list .response')
    ? requestAnimationFrame(() => setTimeout(() => done(performance.now()))) : setTimeout(look, 1);
  look();
})"""
SCROLL = """() => new Promise((done) => {
  let last = performance.now(), longest = 0, y = 0;
  const end = document.documentElement.scrollHeight;
  const step = (now) => {
    longest = Math.max(longest, now - last);
    last = now;
    y += 400;
    window.scrollTo(0, y);
    if (y < end) requestAnimationFrame(step); else done(longest);
  };
  requestAnimationFrame(step);
})"""
FIRST_PAINT = """new Promise(done => {
  const observer = new PerformanceObserver(list => {
    for (const entry of list.getEntriesByName('first-contentful-paint')) done(entry.startTime);
  });
  observer.observe({type: 'paint', buffered: true});  // Chromium records a paint some time after the frame.
})"""


def measure(prompts: int, group: int, tokens: int, rounds: int) -> dict[str, float | int]:
    """Seconds to write and to open the page, its size, and what is in the document at a time."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("expected Chromium on this machine, found none; apt-get install chromium")
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as driver:
        texts = {(r, t): f" w{(r * tokens + t) % 20_000}" for r in range(prompts * group) for t in range(tokens)}
        tables = write_tables(Path(directory), prompts=prompts, group=group, tokens=tokens, layers=28, texts=texts)
        result, path = result_of(tables), Path(directory) / "report.html"
        started = time.perf_counter()
        path.write_text(page(run_sections(result, tables)), encoding="utf-8")
        written = time.perf_counter() - started
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened, painted, frames, elements = [], [], [], 0
        for _ in range(rounds):
            tab = browser.new_page()
            tab.goto(path.as_uri(), wait_until="commit")
            opened.append(tab.evaluate(FIRST_FRAME) / 1000)
            painted.append(tab.evaluate(FIRST_PAINT) / 1000)
            frames.append(tab.evaluate(SCROLL) / 1000)
            elements = tab.evaluate("document.querySelectorAll('*').length")
            tab.close()
        browser.close()
        return {
            "responses": prompts * group,
            "tokens": tokens,
            "megabytes": path.stat().st_size / 1e6,
            "write_seconds": written,
            "first_paint_seconds": median(painted),
            "longest_frame_seconds": median(frames),
            "open_seconds": median(opened),
            "smallest": min(opened),
            "largest": max(opened),
            "elements": elements,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few short responses")
    parser.add_argument("--long", action="store_true", help="256 responses of 1,000 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    size = (4, 4, 20) if arguments.quick else (32, 8, 1000) if arguments.long else (64, 8, 200)
    found = measure(*size, rounds=arguments.rounds)
    for name, value in found.items():
        print(f"{name:>22} {value:.3g}" if isinstance(value, float) else f"{name:>22} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    if not arguments.quick and found["open_seconds"] > LIMIT:
        raise SystemExit(f"expected the page to open within {LIMIT:g} s")


if __name__ == "__main__":
    main()
