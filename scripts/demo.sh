#!/usr/bin/env bash
# Sets everything up and runs the demo: labelled-only against DyCON on generated images, scored on test cases.
# After installation at most 15 minutes on two CPU cores; leaves .venv and the folder demo/ behind (100 MB). The last
# lines are the table of scores and the report to open.
# A second call resumes where the first one stopped.
#
# usage: scripts/demo.sh [--venv DIR] [options of scripts/demo.py, for example --task04 PATH, --out DIR, --help]
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repository/scripts/setup_env.sh"

venv=
if [ "${1:-}" = --venv ]; then
    venv=${2:?"--venv needs a folder"} && shift 2
fi
setup_env "$repository" "$venv"
exec "$PYTHON" "$repository/scripts/demo.py" "$@"
