#!/usr/bin/env bash
# Set up .venv and run all tests, with thinned matrices of cases or with --full the whole of them. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements-dev.txt
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest "$@"
