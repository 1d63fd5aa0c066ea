# Sourced by the other scripts: makes .venv in the repository root and installs the package into it, once.
#   ready_venv        the package          ready_venv test    and what its tests need
# Sets $root and $python. Where pip has only CUDA builds of torch and a CPU build will do, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before the first run.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

die() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

system_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

ready_venv() {
    local extra="${1:-}" stamp="$root/.venv/.installed" state base
    if ! "$python" -c '' 2>/dev/null; then
        base="$(system_python)" || die "needs Python 3.10 or newer; install python3"
        echo "making $root/.venv ..." >&2
        rm -rf "$root/.venv"
        "$base" -m venv "$root/.venv" || die "$base cannot make a virtual environment; install its venv package (python3-venv)"
    fi
    # What an install depends on: pyproject.toml, and where the sources lie, since it points to them.
    state="$("$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read() + sys.argv[1].encode()).hexdigest())' "$root/pyproject.toml")"
    # An install with the tests' extras serves both.
    if grep -qsx -e "$state test" -e "$state $extra" "$stamp"; then
        return
    fi
    echo "installing llama_dist into $root/.venv ..." >&2
    "$python" -m pip install --disable-pip-version-check -q -e "$root${extra:+[$extra]}" || die "pip could not install llama_dist; see above"
    echo "$state $extra" >>"$stamp"
}
