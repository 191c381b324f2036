# Sourced by quickstart.sh and test.sh: makes .venv from $1 (a requirements file) where it is missing or outdated.
# Sets PYTHON, and DS_ACCELERATOR=cpu where there is no GPU.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

find_python() {
  for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed and none was found: install python3.11." >&2
  return 1
}

make_environment() {
  local stamp wanted python
  stamp=.venv/.installed-$(basename "$1")
  wanted=$(cat requirements*.txt pyproject.toml | sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  python=$(find_python)
  if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || {
      echo "error: $python can't make a virtual environment: install its venv package (Debian: python3-venv)." >&2
      return 1
    }
  fi
  echo "installing $1 into .venv (a few minutes the first time)"
  .venv/bin/python -m pip install --quiet --requirement "$1"
  if [ -f "${1%.txt}-alone.txt" ]; then
    .venv/bin/python -m pip install --quiet --no-deps --requirement "${1%.txt}-alone.txt"
  fi
  .venv/bin/python -m pip install --quiet --no-deps --editable .
  echo "$wanted" >"$stamp"
}

make_environment "$1"
export PATH="$root/.venv/bin:$PATH"
PYTHON=$root/.venv/bin/python
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" = 0 ]; then
  export DS_ACCELERATOR=cpu
fi
