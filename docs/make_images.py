"""Take the pictures of docs/tutorial.md from the report.html of runs, with Chromium.

    python docs/make_images.py runs/why
    python docs/make_images.py --real runs/demo-smollm2

The first run needs an attribution and a validation, as the tutorial makes it; the other is that of make demo-real.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"


def between(page: Page, first: str | None, last: str) -> bytes:
    """The page at full width from where one element begins, or its top, to where another does."""
    width = page.evaluate("document.documentElement.clientWidth")
    tops = (
        "(selectors) => selectors.map((s) => s ? document.querySelector(s).getBoundingClientRect().top + scrollY : 0)"
    )
    top, bottom = page.evaluate(tops, [first, last])
    return page.screenshot(full_page=True, clip={"x": 0, "y": top, "width": width, "height": bottom - top})


def tokens(page: Page) -> bytes:
    """The responses to the prompt with the largest contribution, at the token that pushes entropy down most."""
    page.locator("[data-prompt]").first.click()
    page.evaluate("document.querySelector('#responses-title').scrollIntoView()")
    page.mouse.move(0, 0)
    page.locator("#list .down6, #list .down5").first.focus()
    return page.screenshot()


def main(run: Path, *, real: bool) -> None:
    """Write docs/images/*.png."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium is not None, "expected Chromium; apt-get install chromium"
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])

        def save(name: str, content: bytes) -> None:
            (IMAGES / f"{name}.png").write_bytes(content)

        def opened(width: int, height: int, **options: str) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": height}, reduced_motion="reduce", bypass_csp=True, **options
            )
            page = context.new_page()
            page.goto((run / "report.html").resolve().as_uri())
            return page

        page = opened(1080, 900)
        if real:
            page.add_style_tag(content=".top { position: static; }")
            save("smollm2", tokens(page))
            browser.close()
            return
        save("report", between(page, None, "#prompts"))
        page.add_style_tag(content=".top { position: static; }")
        save("prompts", between(page, "#prompts-title", "#responses"))
        save("layers", between(page, "#layers-title", "#validation"))
        save("tokens", tokens(page))
        phone = opened(390, 844, color_scheme="dark")
        save("phone", phone.screenshot())
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[-1]), real="--real" in sys.argv)
