#!/usr/bin/env bash
# Sets everything up (.venv, once) and passes the tests. Arguments go to pytest: ./test.sh tests/test_diffusion.py
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
if ! command -v chromium chromium-browser google-chrome > /dev/null; then # tests/test_app.py drives a browser
    { [ "$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium > /dev/null; } ||
        echo "There is no Chromium for tests/test_app.py: install it, such as by: sudo apt-get install chromium" >&2
fi
ruff check .
ruff format --check .
exec python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadgroup --no-loadscope-reorder "$@"
