#!/bin/sh
# Makes .tools/ (Pipenv) and .venv/ (the packages of Pipfile.lock), where they are missing or old.
# It takes the Python that PYTHON names, if that is set.
# `setup.sh tools` makes .tools/ only. `setup.sh peers` makes build/peers-venv/ for `make bench`, and
# `setup.sh book` makes build/book-venv/ for `make book`.
# `setup.sh python` prints which Python it would take, and `setup.sh current` says by its status
# whether .venv/ is up to date; neither makes anything.
set -eu
cd "$(dirname "$0")/.."
pipenv=2026.10.3
log=build/setup.log

fail() {
  echo "$1" >&2
  exit 1
}

explain() { # say why an installation failed, as far as its log tells
  if grep -qiE 'name resolution|name or service not known|nodename nor servname|connection (refused|reset)|connect timeout|network is unreachable|proxyerror|read timed out' "$log"; then
    fail "PyPI cannot be reached: connect this machine to the network and run make again (what pip said: $log; docs/troubleshooting.md#pypi-cannot-be-reached)."
  elif grep -q 'No space left' "$log"; then
    fail "The disk is full: the installation needs about 3 GB (what pip said: $log; docs/troubleshooting.md#the-disk-is-full)."
  elif grep -qE 'No matching distribution|not a supported wheel' "$log"; then
    fail "PyPI has no package for this machine; TensorFlow needs Linux, or macOS on Apple silicon (what pip said: $log; docs/troubleshooting.md#pypi-has-no-package-for-this-machine)."
  fi
  fail "The installation failed; $log says why."
}

suits() { # print a command's Python, if it runs, has venv, and is a version that TensorFlow supports
  "$1" -c '
import ensurepip, sys, venv
if not (3, 11) <= sys.version_info[:2] <= (3, 13): sys.exit(1)
print(sys.executable)' 2>/dev/null
}

find_python() { # print the Python that PYTHON names, or else the first one that suits
  if [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" || fail "$PYTHON is no Python 3.11, 3.12 or 3.13 with its venv module: give another path, or none: make PYTHON=/path/to/python3 ..."
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3; do
    suits "$candidate" && return
  done
  fail "No Python 3.11, 3.12 or 3.13 with its venv module was found: install one (Debian and Ubuntu: apt install python3-venv; macOS: brew install python@3.13), or name yours: make PYTHON=/path/to/python3 ... (docs/troubleshooting.md#no-python-that-suits)"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

check_choice() { # stop where PYTHON cannot be used, or where another Python was used before
  chosen=$(find_python)
  for folder in .tools .venv; do
    before=$(version_of "$folder/bin/python") || continue
    if [ "$before" != "$(version_of "$chosen")" ]; then
      fail "$folder has Python $before, and $PYTHON is $(version_of "$chosen"): make clean first, or leave PYTHON out."
    fi
  done
}

has_pipenv() { [ "$(.tools/bin/python -m pipenv --version 2>/dev/null)" = "pipenv, version $pipenv" ]; }
is_current() { .venv/bin/python -c '' 2>/dev/null && cmp -s Pipfile.lock .venv/Pipfile.lock; }

verify() { # check that an environment holds all of a lock; only then does it count as current
  said=$("$1/bin/python" workbook/installed.py "$2" 2>&1) || fail "$said"
  said=$("$1/bin/python" -m pip check 2>&1) || fail "The installed packages do not fit: $said."
  cp "$2" "$1/Pipfile.lock"
}

# Whatever a user has set for other work, packages go into our folders and pass through our disk.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_NO_DEPS PIP_REQUIRE_HASHES PIPENV_PIPFILE PIPENV_PYTHON
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0
if [ "${1:-}" = python ]; then find_python; exit; fi
if [ "${1:-}" = current ]; then is_current; exit; fi
if [ -n "${PYTHON:-}" ]; then check_choice; fi
if [ "${1:-}" = "" ] && is_current; then exit; fi
mkdir -p build/tmp
export TMPDIR="$PWD/build/tmp"
trap 'rm -rf build/tmp' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIPENV_VENV_IN_PROJECT=1 PIPENV_IGNORE_VIRTUALENVS=1 PIPENV_NOSPIN=1

if ! has_pipenv; then
  python=$(find_python)
  echo "installing Pipenv into .tools/ (log in $log)"
  { "$python" -m venv --clear .tools && .tools/bin/python -m pip install "pipenv==$pipenv"; } >"$log" 2>&1 || explain
fi

install_apart() { # make an environment of its own, from the lock of a folder
  if cmp -s "$1/Pipfile.lock" "$2/Pipfile.lock"; then return; fi
  echo "installing the packages $3 into $2/ (log in $log)"
  .tools/bin/python -m venv --clear "$2"
  env -u PIPENV_IGNORE_VIRTUALENVS PIPENV_PIPFILE="$PWD/$1/Pipfile" \
    VIRTUAL_ENV="$PWD/$2" .tools/bin/python -m pipenv sync >"$log" 2>&1 || explain
  verify "$2" "$1/Pipfile.lock"
}

if [ "${1:-}" = peers ]; then
  install_apart bench build/peers-venv "that make bench compares with"
elif [ "${1:-}" = book ]; then
  install_apart workbook/book build/book-venv "that make book renders with"
elif [ "${1:-}" = "" ]; then
  .venv/bin/python -c '' 2>/dev/null || rm -rf .venv
  echo "installing the packages of Pipfile.lock into .venv/ (about 2 minutes, log in $log)"
  .tools/bin/python -m pipenv --python "$PWD/.tools/bin/python" sync --dev >"$log" 2>&1 || explain
  # What a library logs from C++ goes to the terminal, not into a lesson.
  mkdir -p .venv/etc/ipython
  echo 'c.IPKernelApp.capture_fd_output = False' >.venv/etc/ipython/ipython_kernel_config.py
  verify .venv Pipfile.lock
fi
