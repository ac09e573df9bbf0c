"""Draw docs/images/app.png: the page of app.py in a headless Chromium, tiny-sd beside what is named.

accelerate launch train_flash_lora.py --num_ddim_steps 4 --max_steps 100 --batch_size 8 --export int8 --run_name app
python docs/draw_app.py outputs/app/lora/final outputs/app/lora/final-int8
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PORT, SECONDS = "7999", 600_000
PROMPT = "a large blue ring on a white background"


def main():
    command = [sys.executable, str(ROOT / "app.py"), str(ROOT / "assets/tiny-sd"), *sys.argv[1:], "--port", PORT]
    server = subprocess.Popen([*command, "--prompt", PROMPT], stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("The page is at") for line in server.stdout), "app.py did not start"
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            page.set_default_timeout(SECONDS)
            page.goto(f"http://127.0.0.1:{PORT}")
            page.click("#generate")
            page.wait_for_selector("#status >> text=of seed 0")
            page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # until nothing moves
            page.screenshot(path=ROOT / "docs/images/app.png", full_page=True)
    finally:
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()
