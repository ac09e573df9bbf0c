#!/usr/bin/env bash
# Sets everything up (.venv, once) and passes the tests. Arguments go to pytest: ./test.sh tests/test_diffusion.py
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
ruff check .
ruff format --check .
exec python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadgroup "$@"
