# Sourced by test.sh: installs, from Debian or Ubuntu, what some tests need: daemons, and headers of C++.

# ready_commands "COMMAND ..." PACKAGE ...: returns 0 if the commands, or files by their paths, are there or can be installed.
ready_commands() {
    local name missing="" root_by=()
    PATH="$PATH:/usr/sbin:/sbin"
    for name in $1; do
        [[ -e "$name" ]] || command -v "$name" >/dev/null || missing+=" $name"
    done
    [[ "$missing" ]] || return 0
    ((EUID == 0)) || root_by=(sudo -n)
    if ! command -v apt-get >/dev/null || ! "${root_by[@]}" true 2>/dev/null; then
        echo "no$missing here, and no root with apt-get to install ${*:2}" >&2
        return 1
    fi
    echo "installing ${*:2} ..." >&2
    "${root_by[@]}" apt-get update -qq >&2 &&
        "${root_by[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${@:2}" >/dev/null
}
