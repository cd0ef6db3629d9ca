# Sourced by demo.sh and test.sh. The first call takes minutes and up to 7 GB, later ones nothing.
#
# setup_env REPOSITORY [VENV] leaves in $PYTHON an interpreter with this package, editable, and its test tools.
# It takes VENV if given, else the active virtual environment, else REPOSITORY/.venv, which it makes if necessary.
# It installs again only after pyproject.toml or setup.py have changed.

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 or newer found: install one, for example your system's package python3." >&2
    return 1
}

setup_env() {
    local repository=$1 venv=${2:-${VIRTUAL_ENV:-$1/.venv}} base stamp wanted
    PYTHON=$venv/bin/python
    if [ ! -x "$PYTHON" ]; then
        base=$(find_python) || return 1
        echo "Virtual environment: $venv ($("$base" --version))"
        if ! "$base" -m venv "$venv"; then
            echo "error: $base cannot make virtual environments: install your system's package python3-venv." >&2
            return 1
        fi
    fi
    stamp=$venv/.nnunetv2_dycon
    wanted="$repository $(cat "$repository/pyproject.toml" "$repository/setup.py" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    rm -f "$stamp"
    echo "Installing nnU-Net and this package into $venv. The first time takes longest."
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        echo "No NVIDIA GPU here, but the wheels that pip takes by default may bring CUDA libraries (4 GB)."
        echo "To avoid them stop this with Ctrl-C, type the next line, and start again:"
        echo "    '$PYTHON' -m pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    fi
    # one command, so that pip resolves matching torch and torchvision
    if ! "$PYTHON" -m pip install --editable "$repository[test]"; then
        echo "error: the installation failed; pip says why above. Start this command again to go on." >&2
        return 1
    fi
    echo "$wanted" >"$stamp"
}
