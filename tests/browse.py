"""Opens the documentation in a Chromium without a window: `python tests/browse.py build/site [PICTURES]`.

Start page, search, reference, a notebook, the table of networks; light and dark, wide and narrow. Nothing may be asked for
elsewhere than in the site, no page may be wider than the window, no script may fail. With a folder, each page is a picture
in it. Without a Chromium, the pages are only read.
"""

import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGES = ("index.html", "reference/plans.html", "01_quickstart.html", "glossary.html", "networks.html", "changelog.html")
WIDTHS = (1400, 600)


class Quiet(SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, *_) -> None: ...


def served(site: Path) -> str:
    """Where the site is to be had, for as long as this process lives."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def look(page, home: str, scheme: str, pictures: Path | None) -> None:
    """Every page at every width, and the search; asserts what is to hold."""
    for name in PAGES:
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(f"{home}/{name}")
            page.wait_for_load_state("networkidle")
            assert page.locator("article h1").first.inner_text(), name
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} wide in a window of {width}"
            if pictures is not None:
                page.screenshot(path=pictures / f"{name.replace('/', '_')}.{scheme}.{width}.png")
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})
    page.goto(f"{home}/reference/plans.html")
    assert page.locator("h2", has_text="fit_plan").count() and page.locator("article .highlight").count()
    page.goto(f"{home}/01_quickstart.html")
    assert page.locator(".jp-CodeCell").count() > 3 and page.locator(".jp-OutputArea-output").count() > 3
    page.goto(f"{home}/index.html")
    page.locator("input[name=query]").fill("UnfreezeAt")
    page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
    if pictures is not None:
        page.screenshot(path=pictures / f"search.{scheme}.png")
    assert "reference/" in " ".join(a.get_attribute("href") for a in page.locator(".md-search-result__link").all())


def ground(page) -> int:
    """How light the page is, from 0 to 765."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(float(n)) for n in colour[colour.index("(") + 1 : -1].split(",")[:3])


def main(site: Path, pictures: Path | None) -> None:
    """Raises AssertionError where something is not as it should be."""
    missing = [name for name in PAGES if not (site / name).is_file()]
    assert not missing, f"there is no {missing}"
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        print(f"There is no Chromium ({', '.join(BROWSERS)}), so no page was opened.")
        return
    from playwright.sync_api import sync_playwright

    home = served(site)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        grounds = []
        for scheme in ("light", "dark"):
            page = browser.new_context(color_scheme=scheme).new_page()
            asked: list[str] = []
            wrong: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.on("console", lambda said, wrong=wrong: wrong.append(said.text) if said.type == "error" else None)
            look(page, home, scheme, pictures)
            elsewhere = {url for url in asked if not url.startswith((home, "data:", "blob:"))}
            assert not elsewhere, f"the site asks for {elsewhere}"
            assert not wrong, wrong
            grounds.append(ground(page))
        browser.close()
    assert grounds[0] > 600 > 300 > grounds[1], f"light and dark are {grounds}"
    print(
        f"{len(PAGES)} pages, {' and '.join(map(str, WIDTHS))} px, light and dark, and the search: all as they should be."
    )


if __name__ == "__main__":
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), folder)
