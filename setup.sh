#!/usr/bin/env bash
# Make .venv with everything that `make run` and `make test` need. Idempotent; `make setup` calls it.
# Debian and Ubuntu split Python into packages: what is missing of it comes from apt-get where we may use it.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
venv=${VENV:-.venv}

die() { echo "setup: $*" >&2; exit 2; }

apt_install() {
    local mend="apt-get install $*" sudo=()
    command -v apt-get >/dev/null || die "missing: $* (no apt-get here; install it with your package manager)"
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || die "missing: $*; run: sudo $mend"
        sudo=(sudo -n)
    fi
    echo "setup: $mend" >&2
    "${sudo[@]}" apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -q -y --no-install-recommends "$@" >/dev/null \
        || die "failed: $mend"
}

command -v "$python" >/dev/null || die "no $python; install Python 3.10 to 3.13, or: make PYTHON=PATH"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) die "$python is Python $version; 3.10 to 3.13 will do, for instance: make PYTHON=python3.12" ;;
esac
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "the Triton wheel is for Linux on x86_64 only"

# Triton's stub embeds Python and loads its shared library, which Debian ships apart from the interpreter.
has_libpython() {
    "$python" - <<'PY'
import pathlib, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
config = sysconfig.get_config_vars()
places = [config.get("LIBDIR"), sys.base_prefix + "/lib", "/usr/lib/" + (config.get("MULTIARCH") or "")]
sys.exit(not any(place and (pathlib.Path(place) / name).exists() for place in places))
PY
}
missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
if [ "$("$python" -c 'import sys; print(sys.base_prefix)')" = /usr ]; then
    has_libpython || missing+=("libpython$version")
fi
[ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"

# A venv of another Python version, or one whose interpreter is gone, is made anew.
if ! "$venv/bin/python" -c "import sys, pip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
runtime=cpu
[ -e /dev/nvidiactl ] && runtime=gpu
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
pip install --upgrade 'pip>=24'
pip install -e ".[$runtime,dev]"
# Its metadata pins numpy<2 and pulls a web stack; only the server and the libraries inside are wanted.
pip install --no-deps nvidia-pytriton==0.7.0
"$venv/bin/python" perf/install_perf_analyzer.py
touch "$venv/.ready"
