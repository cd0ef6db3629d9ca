#!/usr/bin/env bash
# Sets up an environment and runs every check: style, types, fast tests, slow tests. About half an hour on two cores,
# installation included; leaves .venv behind. Exit code 0 only if everything passed.
#
# usage: scripts/test.sh [--venv DIR] [--fast]
#   --venv DIR  environment to use or to make (default: the active one, else .venv)
#   --fast      without the slow tests
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repository/scripts/setup_env.sh"

venv= slow=yes
while [ $# -gt 0 ]; do
    case $1 in
        --venv) venv=${2:?"--venv needs a folder"} && shift 2 ;;
        --fast) slow=no && shift ;;
        *) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
setup_env "$repository" "$venv"
cd "$repository"

# Processes that all take every core slow each other down.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MPLBACKEND=agg
# Tests make their own folders and never use those of the user.
unset nnUNet_raw nnUNet_preprocessed nnUNet_results

failed=()
check() {
    echo "== $*"
    "$PYTHON" -m "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .
check mypy
# Two at a time; the tests of one file stay together and share its fixtures.
check pytest -n 2 --dist loadfile
# Tests marked data need real scans, and tests marked gpu a GPU: run them by name.
[ $slow = no ] || check pytest -n 2 --dist loadfile -m "slow and not data and not gpu"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "All checks passed."
